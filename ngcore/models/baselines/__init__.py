"""Models that read parameters without a graph: MLP, Set NN, StatNN, DWSNet and NFN; and controls that read none."""

from ngcore.models.baselines.constant_edit import ConstantEdit
from ngcore.models.baselines.dws import DWSNet, EquivariantDWSNet
from ngcore.models.baselines.mlp import MLP
from ngcore.models.baselines.nfn import NFN, EquivariantNFN
from ngcore.models.baselines.picture_filter import PictureFilter
from ngcore.models.baselines.points import PointsMLP
from ngcore.models.baselines.set_nn import SetNN
from ngcore.models.baselines.stat_nn import StatNN

__all__ = [
    "MLP",
    "NFN",
    "ConstantEdit",
    "DWSNet",
    "EquivariantDWSNet",
    "EquivariantNFN",
    "PictureFilter",
    "PointsMLP",
    "SetNN",
    "StatNN",
]
