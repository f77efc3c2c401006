"""Models that read parameters without a graph: MLP, Set NN and DWSNet."""

from ngcore.models.baselines.dws import DWSNet
from ngcore.models.baselines.mlp import MLP
from ngcore.models.baselines.set_nn import SetNN

__all__ = ["MLP", "DWSNet", "SetNN"]
