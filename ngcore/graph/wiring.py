"""The wiring of a network: which neurons there are and which parameter connects which of them.

A wiring holds no weights. It is read once per architecture; `Wiring.graph` then lays any number of weights into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from ngcore.graph.neural_graph import NeuralGraph

Role = Literal["input", "hidden", "output"]


@dataclass(frozen=True)
class Group:
    """A set of neurons of one layer.

    `bias` names the parameter of shape (size,) that becomes their node feature, None where they have none.
    `activation` is what is applied to the neurons' sums; `layer` counts from 0 at the input.
    """

    size: int
    role: Role
    layer: int
    activation: str = "identity"
    bias: str | None = None


@dataclass(frozen=True)
class Block:
    """A complete bipartite set of edges: parameter `weight`, of shape (target size, source size)."""

    source: int
    target: int
    weight: str


@dataclass(frozen=True)
class Wiring:
    """Groups of neurons and the blocks of edges between them. Hashable, so that it can key a cache."""

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Index of each group's first node in the whole graph, and after them the number of nodes."""
        total, offsets = 0, [0]
        for group in self.groups:
            total += group.size
            offsets.append(total)
        return tuple(offsets)

    @property
    def num_nodes(self) -> int:
        return self.offsets[-1]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the input network, by name, in the order of its layers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for block in self.blocks:
            target = self.groups[block.target]
            shapes[block.weight] = (target.size, self.groups[block.source].size)
            if target.bias is not None:
                shapes[target.bias] = (target.size,)
        return shapes

    def with_role(self, *roles: Role) -> tuple[int, ...]:
        """Indices of the groups that have one of these roles."""
        return tuple(i for i, group in enumerate(self.groups) if group.role in roles)

    def graph(self, state_dict: Mapping[str, Tensor]) -> NeuralGraph:
        """Lay weights into the wiring, as views (paper, equation 1).

        Shapes:
            state_dict: every parameter with its own shape, or all of them behind the same batch axes.

        Raises:
            ValueError: names the parameter that is missing, unknown, or of another shape.
        """
        unknown = sorted(set(state_dict) - set(self.shapes))
        missing = sorted(set(self.shapes) - set(state_dict))
        if unknown or missing:
            raise ValueError(f"parameters do not fit the wiring: missing {missing}, unknown {unknown}")
        batch = None
        for name, shape in self.shapes.items():
            found = tuple(state_dict[name].shape)
            if found[len(found) - len(shape) :] != shape:
                raise ValueError(f"parameter {name} has shape {found}; the wiring needs (..., {str(shape)[1:]}")
            axes = found[: len(found) - len(shape)]
            if batch is not None and axes != batch:
                raise ValueError(f"parameter {name} has batch axes {axes}, the parameters before it {batch}")
            batch = axes
        first = state_dict[self.blocks[0].weight]
        nodes = tuple(
            first.new_zeros(*batch, group.size, 1) if group.bias is None else state_dict[group.bias].unsqueeze(-1)
            for group in self.groups
        )
        edges = tuple(state_dict[block.weight].unsqueeze(-1) for block in self.blocks)
        return NeuralGraph(self, nodes, edges)


def mlp(sizes: Sequence[int], activation: str = "relu") -> Wiring:
    """Wiring of a multi-layer perceptron with parameters `layers.<i>.weight` and `layers.<i>.bias`.

    `sizes` counts the neurons from input to output; the activation follows every layer but the last.
    """
    if len(sizes) < 2:
        raise ValueError(f"an MLP needs at least an input and an output layer, got sizes {list(sizes)}")
    last = len(sizes) - 1
    groups = [Group(sizes[0], "input", 0)]
    for i, size in enumerate(sizes[1:], start=1):
        role: Role = "output" if i == last else "hidden"
        groups.append(Group(size, role, i, "identity" if i == last else activation, f"layers.{i - 1}.bias"))
    blocks = tuple(Block(i, i + 1, f"layers.{i}.weight") for i in range(last))
    return Wiring(tuple(groups), blocks)
