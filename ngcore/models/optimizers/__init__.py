"""Learned optimizers: metanetworks that read a network's gradients and change its parameters."""

from ngcore.models.optimizers.context import FEATURES
from ngcore.models.optimizers.layout import Layout
from ngcore.models.optimizers.learned import METHODS, BoundOptimizer, LearnedOptimizer

__all__ = ["FEATURES", "METHODS", "BoundOptimizer", "Layout", "LearnedOptimizer"]
