"""Models that read parameters without a graph: MLP, Set NN, StatNN, DWSNet and NFN; and the control of probe features."""

from ngcore.models.baselines.dws import DWSNet, EquivariantDWSNet
from ngcore.models.baselines.mlp import MLP
from ngcore.models.baselines.nfn import NFN, EquivariantNFN
from ngcore.models.baselines.points import PointsMLP
from ngcore.models.baselines.set_nn import SetNN
from ngcore.models.baselines.stat_nn import StatNN

__all__ = ["MLP", "NFN", "DWSNet", "EquivariantDWSNet", "EquivariantNFN", "PointsMLP", "SetNN", "StatNN"]
