"""The wiring of a network: which neurons there are and which parameter connects which of them.

A wiring holds no weights. It is read once per architecture; `Wiring.graph` then lays any number of weights into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ngcore.graph.neural_graph import NeuralGraph
from ngcore.graph.spaces import Space
from ngcore.graph.symmetry import Symmetry

Role = Literal["input", "hidden", "output"]


@dataclass(frozen=True)
class View:
    """Where in a parameter's memory some of its elements lie: sizes, strides and offset as of `Tensor.as_strided`."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def narrow(self, axis: int, start: int, length: int) -> View:
        size = (*self.size[:axis], length, *self.size[axis + 1 :])
        return View(size, self.stride, self.offset + start * self.stride[axis])

    def __call__(self, parameter: Tensor, batch: int) -> Tensor:
        """The elements, as a view behind the parameter's first `batch` axes."""
        parameter = parameter.contiguous()
        axes = parameter.shape[:batch], parameter.stride()[:batch]
        offset = parameter.storage_offset() + self.offset
        return parameter.as_strided((*axes[0], *self.size), (*axes[1], *self.stride), offset)


@dataclass(frozen=True)
class Group:
    """A set of neurons of one layer.

    `bias` names the parameter that becomes their node feature, None where they have none; `view` says which of its
    elements, None for all, in order. `activation` is what is applied to the neurons' sums; `layer` counts from 0 at
    the input; `where` is the path of the module that they belong to. `tied`: the bias has its place in an earlier
    group. `location`: where in space these neurons' channels are flattened from, which must not be exchanged.
    """

    size: int
    role: Role
    layer: int
    activation: str = "identity"
    bias: str | None = None
    view: View | None = None
    where: str = ""
    tied: bool = False
    location: int | None = None


@dataclass(frozen=True)
class Block:
    """Edges from some neurons of one group to some of another, each source to each target.

    With `groups` the neurons fall into as many parts, in order, and edges stay inside a part: grouped convolutions,
    normalization (every neuron a part) and residual connections.

    Attributes:
        weight: the parameter on the edges; None where they have none and the value 1 (residuals, products).
        kind: what the edges do, e.g. "linear", "convolution", "normalization", "residual", "product".
        kernel: sizes of a convolution's kernel, whose positions are the features in row-major order.
        view: where its elements lie, as (groups, targets of a part, sources of a part, *features); None for a whole
            parameter of shape (targets, sources).
        source_nodes, target_nodes: places in the groups; None for all.
        tied: these edges share their parameter with an earlier block.
    """

    source: int
    target: int
    weight: str | None
    kind: str = "linear"
    view: View | None = None
    groups: int = 1
    kernel: tuple[int, ...] = ()
    source_nodes: Sequence[int] | None = None
    target_nodes: Sequence[int] | None = None
    tied: bool = False


@dataclass(frozen=True, eq=False)
class Step:
    """One operator of the network, in the order in which they run: what happens to values between the neurons.

    Attributes:
        operator: its name, or "input", "parameter", "buffer", "constant", "output".
        arguments: its own, with a `Reference` for every result of an earlier step.
        ids: the neuron behind every element of its result, broadcastable to it; None where it has none.
        blocks: indices of the edges that it made; they hold the numbers that it computes with.
        parameter: the parameter that the result is (a part of), which is on the edges and nodes.
        where: path of the module to which it belongs.
    """

    operator: str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    ids: Tensor | None = None
    blocks: range = range(0)
    parameter: str | None = None
    where: str = ""

    @property
    def name(self) -> str:
        """The operator without its library and overload."""
        return self.operator.split(".")[1] if "." in self.operator else self.operator


@dataclass(frozen=True)
class Reference:
    """The result of a step."""

    step: int


@dataclass(frozen=True)
class Wiring:
    """Groups of neurons and the blocks of edges between them. Hashable, so that it can key a cache.

    Attributes:
        parameters: name and shape of every parameter on the graph.
        aliases: further names under which parameters occur in the state dict, with the first one.
        others: entries of the state dict that are not on the graph: running statistics, what no operator reads.
        symmetry: the permutations that keep the network's function.
        steps: the operators around neurons and edges, for a forward pass on the graph; empty for a wiring by hand.
    """

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()
    symmetry: Symmetry = field(default_factory=lambda: Symmetry({}), compare=False, repr=False)
    steps: tuple[Step, ...] = field(default=(), compare=False, repr=False)

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
        return dict(self.parameters)

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
        batch = self._batch_axes(state_dict)
        first = next(iter(state_dict[name] for name in self.shapes))
        nodes = tuple(self._node_features(group, state_dict, first, batch) for group in self.groups)
        edges = tuple(self._edge_features(block, state_dict, first, batch) for block in self.blocks)
        return NeuralGraph(self, nodes, edges, {name: state_dict[name] for name in self.others if name in state_dict})

    def _batch_axes(self, state_dict: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The axes before the parameters' own, the same for all."""
        known = {*self.shapes, *dict(self.aliases), *self.others}
        unknown = sorted(set(state_dict) - known)
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
        return batch

    def _node_features(
        self, group: Group, state_dict: Mapping[str, Tensor], first: Tensor, batch: tuple[int, ...]
    ) -> Tensor:
        if group.bias is None:
            return first.new_zeros(1).expand(*batch, group.size, 1)
        bias = state_dict[group.bias]
        return (bias if group.view is None else group.view(bias, len(batch))).unsqueeze(-1)

    def _edge_features(
        self, block: Block, state_dict: Mapping[str, Tensor], first: Tensor, batch: tuple[int, ...]
    ) -> Tensor:
        if block.weight is None:
            targets = self.groups[block.target].size if block.target_nodes is None else len(block.target_nodes)
            sources = self.groups[block.source].size if block.source_nodes is None else len(block.source_nodes)
            return first.new_ones(1).expand(*batch, targets, sources // block.groups, 1)
        weight = state_dict[block.weight]
        if block.view is None:
            return weight.unsqueeze(-1)
        seen = block.view(weight, len(batch)).flatten(len(batch), len(batch) + 1)
        return seen.flatten(len(batch) + 2) if len(block.view.size) > 3 else seen.unsqueeze(-1)

    def edge_index(self, block: Block) -> Tensor:
        """Source and target of every edge of a block, (2, edges), in the order of its features."""
        source, target = (
            self.offsets[group] + torch.arange(self.groups[group].size)
            if nodes is None
            else self.offsets[group] + torch.tensor(list(nodes))
            for group, nodes in ((block.source, block.source_nodes), (block.target, block.target_nodes))
        )
        sources, targets = source.view(block.groups, 1, -1), target.view(block.groups, -1, 1)
        return torch.stack([x.flatten() for x in torch.broadcast_tensors(sources, targets)])


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
    spaces = [Space(size, pinned=i in (0, last)) for i, size in enumerate(sizes)]
    axes: dict[str, tuple[Space, ...]] = {}
    for i in range(last):
        axes[f"layers.{i}.weight"] = (spaces[i + 1], spaces[i])
        axes[f"layers.{i}.bias"] = (spaces[i + 1],)
    parameters = tuple((name, tuple(space.size for space in own)) for name, own in axes.items())
    return Wiring(tuple(groups), blocks, parameters, symmetry=Symmetry(axes))
