"""Metanetworks: networks that read neural graphs."""

from ngcore.models.ng_gnn import NGGNN
from ngcore.models.ng_t import NGT

__all__ = ["NGGNN", "NGT"]
