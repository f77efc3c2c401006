"""Metanetworks: networks that read neural graphs."""

from ngcore.models.editing import Editor
from ngcore.models.heads import PerParameter, Scores
from ngcore.models.ng_gnn import NGGNN
from ngcore.models.ng_t import CNN_WIDTHS, INR_WIDTHS, NGT, Widths

__all__ = ["CNN_WIDTHS", "INR_WIDTHS", "NGGNN", "NGT", "Editor", "PerParameter", "Scores", "Widths"]
