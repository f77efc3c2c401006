"""Reading the wiring of any PyTorch network from its exported operators."""

from ngcore.graph.tracing import rules  # noqa: F401  # registers how operators are read
from ngcore.graph.tracing.export import trace
from ngcore.graph.tracing.reader import TraceError, rule

__all__ = ["TraceError", "rule", "trace"]
