"""Neural graphs: the wiring of a network, weights bound to it, and the symmetries of both."""

from ngcore.graph import draw  # noqa: F401  # shows small graphs as pictures in notebooks
from ngcore.graph.architectures import cnn, mlp
from ngcore.graph.dialects import to_parameter_graph
from ngcore.graph.structure import Block, Group
from ngcore.graph.tracing import TraceError, rule, trace
from ngcore.graph.wiring import NeuralGraph, Wiring

__all__ = [
    "Block",
    "Group",
    "NeuralGraph",
    "TraceError",
    "Wiring",
    "cnn",
    "mlp",
    "rule",
    "to_parameter_graph",
    "trace",
]
