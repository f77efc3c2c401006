"""How each operator is read: what it does to the spaces of its axes, and which neurons and edges it makes.

One function per family of operators, registered when these modules are imported. Operators that only move data are run
on the neurons' ids.
"""

from ngcore.graph.tracing.rules import moving, parameters, reductions  # noqa: F401  # register how operators are read
from ngcore.graph.tracing.rules.elementwise import pointwise

__all__ = ["pointwise"]
