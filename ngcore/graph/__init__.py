"""Neural graphs: the wiring of a network, its weights laid in, and the symmetries of both."""

from ngcore.graph import rules  # noqa: F401  # registers how operators are read
from ngcore.graph.neural_graph import NeuralGraph
from ngcore.graph.parameter_graph import to_parameter_graph
from ngcore.graph.trace import TraceError, rule, trace
from ngcore.graph.wiring import Block, Group, Wiring, mlp

__all__ = [
    "Block",
    "Group",
    "NeuralGraph",
    "TraceError",
    "Wiring",
    "mlp",
    "rule",
    "to_parameter_graph",
    "trace",
]
