"""Metanetworks: networks that read neural graphs."""

from ngcore.models.editing import Editor, edited_parameters
from ngcore.models.ng_gnn import NGGNN, EquivariantNGGNN
from ngcore.models.ng_t import NGT, EquivariantNGT

__all__ = ["NGGNN", "NGT", "Editor", "EquivariantNGGNN", "EquivariantNGT", "edited_parameters"]
