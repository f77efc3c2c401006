"""Metanetworks: networks that read neural graphs."""

from ngcore.models.editing import Editor
from ngcore.models.heterogeneous import HeterogeneousNGGNN, HeterogeneousNGT
from ngcore.models.ng_gnn import NGGNN, EquivariantNGGNN
from ngcore.models.ng_t import NGT, EquivariantNGT

__all__ = ["NGGNN", "NGT", "Editor", "EquivariantNGGNN", "EquivariantNGT", "HeterogeneousNGGNN", "HeterogeneousNGT"]
