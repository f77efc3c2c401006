"""What a network's graph is made of: groups of neurons, blocks of edges, and the steps between them. No weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["input", "hidden", "output"]
NodeKind = Literal["neuron", "bias", "gamma", "beta"]


@dataclass(frozen=True)
class View:
    """Where in a parameter's memory some of its elements lie: sizes, strides and offset of `Tensor.as_strided`."""

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
    group. `locations`: the place in space that every neuron's channel was flattened from; places must not be exchanged.
    `kind`: "bias", "gamma" and "beta" nodes have the value 1 and their layer's parameters on their edges.
    """

    size: int
    role: Role
    layer: int
    activation: str = "identity"
    bias: str | None = None
    view: View | None = None
    where: str = ""
    tied: bool = False
    locations: tuple[int, ...] | None = None
    kind: NodeKind = "neuron"


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


def offsets(groups: Sequence[Group]) -> tuple[int, ...]:
    """Index of each group's first node in the whole graph, and after them the number of nodes."""
    return (0, *accumulate(group.size for group in groups))


def edge_index(groups: Sequence[Group], block: Block) -> Tensor:
    """Source and target of every edge of a block, (2, edges), in the order of its features."""
    first = offsets(groups)
    source, target = (
        first[group] + (torch.arange(groups[group].size) if nodes is None else torch.tensor(list(nodes)))
        for group, nodes in ((block.source, block.source_nodes), (block.target, block.target_nodes))
    )
    sources, targets = source.view(block.groups, 1, -1), target.view(block.groups, -1, 1)
    return torch.stack([x.flatten() for x in torch.broadcast_tensors(sources, targets)])
