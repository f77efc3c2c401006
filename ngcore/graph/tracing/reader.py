"""What is collected while a network's operators are read: neurons, edges, places of parameters, spaces of tensors."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ngcore.graph.structure import Block, Role, View
from ngcore.graph.symmetry.spaces import Space, pin, pinned_leaf, uniform
from ngcore.graph.tracing.expressions import Apply, Expression, Named, X, compose, name_of

NO_NEURON = -1


@dataclass
class Value:
    """What is known of a tensor of the network.

    Attributes:
        axes: the space of every axis.
        ids: the neuron behind every element, int64, broadcastable to the shape: an axis along which it does not vary
            has length 1; `NO_NEURON` where there is none (a statistic, a constant). None for an input of the network
            of which nothing has been read yet.
        made: for such an input, its neurons once they have been made, by the axis along which they lie; shared with
            what acts on every number of the input by itself.
        slot: the parameter, and which of its elements this tensor is: a view of a meta tensor of its shape.
        constant: the numbers, where they depend on no parameter and no input.
        source: the node of the exported graph that made it.
        parent: of an input that has only been transposed: the input, and which of its axes each axis is.
        formula: of a constant that depends on buffers of the state dict, how it does.
        function: what has been applied to the sums of the neurons `ids`, number by number.
        region: the node whose numbers `function` was applied to; None for the source itself.
    """

    shape: tuple[int, ...]
    axes: list[Space]
    ids: Tensor | None = None
    made: dict[int, Tensor] = field(default_factory=dict)
    slot: tuple[str, Tensor] | None = None
    constant: Tensor | None = None
    source: fx.Node | None = None
    parent: tuple[Value, list[int]] | None = None
    formula: Expression | None = None
    function: Expression = X
    region: fx.Node | None = None

    @property
    def origin(self) -> fx.Node | None:
        """Values of one origin are functions of the same numbers."""
        return self.region or self.source

    @property
    def expression(self) -> Any:
        """What an expression holds for this value: a constant's number or name, an activation's function."""
        if self.constant is None:
            return self.function
        if self.formula is not None:
            return self.formula
        return self.constant.item() if self.constant.numel() == 1 else Named(str(self.constant.tolist()))

    @property
    def kind(self) -> str:
        return "parameter" if self.slot is not None else "constant" if self.constant is not None else "activation"


@dataclass
class Neurons:
    """A group of neurons while the network is being read; `copy`: of another group, through a function of its sums."""

    start: int
    size: int
    role: Role
    where: str
    copy: tuple[int, Expression] | None = None
    bias: tuple[str, View] | None = None
    tied: bool = False
    read: bool = False
    locations: tuple[int, ...] | None = None


class TraceError(ValueError):
    """A network that can't be read; the message names the operator, where it is, and what to do."""


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how operators are read, by their names: `@rule("linear")` on a function (reader, *arguments) -> Value.

    Arguments come as the operator's own, with `Value`s for tensors. Names without a dot are ATen's; operators of other
    libraries have theirs before the dot.
    """

    def register(function: Rule) -> Rule:
        RULES.update((name if "." in name else f"aten.{name}", function) for name in names)
        return function

    return register


@dataclass
class Reader:
    """Walks an exported graph and collects groups, blocks and the spaces of all tensors."""

    module: nn.Module
    owners: dict[str, str]
    groups: list[Neurons] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    axes: dict[str, tuple[Space, ...]] = field(default_factory=dict)
    tensors: list[tuple[Space, ...]] = field(default_factory=list)
    slots: dict[str, Tensor] = field(default_factory=dict)
    placed: dict[str, Tensor | None] = field(default_factory=dict)
    """Which elements of a parameter have their place on the graph; None for all of them."""
    vocabularies: dict[Any, Tensor] = field(default_factory=dict)
    copies: dict[tuple[int, str], int] = field(default_factory=dict)
    """Groups through which others are read, by the group that is read and the name of the function."""
    returned: list[Tensor] = field(default_factory=list)
    """The neurons that the network returns."""
    node: fx.Node | None = None
    read: dict[fx.Node, tuple[Any, range, str]] = field(default_factory=dict)
    """What became of every operator: its value, the blocks that it made, and where it is."""

    @property
    def operator(self) -> str:
        """The operator that is being read, with its library and without its overload, e.g. "aten.add"."""
        return str(getattr(self.node.target, "overloadpacket", self.node.target))

    @property
    def where(self) -> str:
        """Path of the module whose operator is being read."""
        stack = self.node.meta.get("nn_module_stack") or {}
        return next(reversed(stack.values()), ("",))[0].removeprefix("L['self'].") if stack else ""

    @property
    def named(self) -> str:
        """Name of that module for a reader of messages."""
        return self.where or type(self.module).__name__

    def fail(self, problem: str) -> TraceError:
        return TraceError(f"{problem} (operator {getattr(self.node, 'target', '')}, module '{self.named}')")

    # Neurons

    def new_neurons(self, size: int, role: Role = "hidden") -> Tensor:
        """A new group; its ids, (size,)."""
        start = self.groups[-1].start + self.groups[-1].size if self.groups else 0
        self.groups.append(Neurons(start, size, role, self.where))
        return torch.arange(start, start + size)

    def group_of(self, neuron: int) -> int:
        return bisect_right(self.groups, neuron, key=lambda group: group.start) - 1

    def groups_of(self, ids: Tensor) -> list[int]:
        """The groups in which these neurons are, in the order in which they were made."""
        return torch.unique(self.places(ids[ids != NO_NEURON])).tolist()

    def places(self, ids: Tensor) -> Tensor:
        """Index of the group of every neuron."""
        starts = np.array([group.start for group in self.groups])
        return torch.from_numpy(np.searchsorted(starts, ids.numpy(), side="right") - 1)

    def bare(self, ids: Tensor, source: fx.Node | None) -> bool:
        """Whether these neurons are still nothing but sums that only the operator being read will see."""
        groups = [self.groups[g] for g in self.groups_of(ids)]
        used_once = source is not None and sum(user.target is not SLICE_SCATTER for user in source.users) <= 1
        return (
            used_once
            and bool((ids != NO_NEURON).all())
            and all(not group.read and group.copy is None and group.role == "hidden" for group in groups)
        )

    def through(self, ids: Tensor, function: Expression, make: bool = True) -> Tensor:
        """The neurons that hold a function of these neurons' sums: copies, made once per function.

        Reading ends with a group as its own only copy where nothing else reads it: see `closing`. Where copies are not
        to be made, and there are none, the neurons themselves.
        """
        if name_of(function) == "identity":
            return ids
        shift = torch.zeros(len(self.groups), dtype=torch.int64)
        for g in self.groups_of(ids):
            parent, own = self.groups[g].copy or (g, X)
            whole = compose(function, own)
            if name_of(whole) == "identity":
                shift[g] = self.groups[parent].start - self.groups[g].start
            elif make or (parent, name_of(whole)) in self.copies:
                shift[g] = self.groups[self._copy(parent, whole)].start - self.groups[g].start
        return torch.where(ids == NO_NEURON, ids, ids + shift[self.places(ids)])

    def _copy(self, parent: int, function: Expression) -> int:
        key = parent, name_of(function)
        if key not in self.copies:
            group = self.groups[parent]
            fresh = self.new_neurons(group.size)
            self.copies[key] = len(self.groups) - 1
            self.groups[-1].copy, self.groups[-1].where = (parent, function), group.where
            self.connect(torch.arange(group.start, group.start + group.size), fresh, "residual", groups=group.size)
        return self.copies[key]

    def originals(self, ids: Tensor) -> Tensor:
        """The neurons of which copies are copies, others themselves."""
        shift = torch.tensor([0 if g.copy is None else self.groups[g.copy[0]].start - g.start for g in self.groups])
        return ids + shift[self.places(ids)]

    def give_back(self, value: Value) -> None:
        """A value that the network returns: its order is the network's own."""
        pin(*value.axes)
        if value.ids is not None:
            self.returned.append(self.neurons(value, -1))

    # Blocks

    def connect(
        self,
        sources: Tensor,
        targets: Tensor,
        kind: str,
        slot: tuple[str, Tensor] | None = None,
        groups: int = 1,
        kernel: tuple[int, ...] = (),
    ) -> None:
        """Edges from neurons to neurons; `slot` is viewed as (groups, targets, sources, *features) of each group."""
        name, view = (None, None) if slot is None else (slot[0], self.view(*slot))
        pieces = [(self.ends(sources, groups), self.ends(targets, groups), view)]
        for axis in (0, 2, 1):
            pieces = [smaller for piece in pieces for smaller in cut_edges(*piece, axis)]
        for own_sources, own_targets, own_view in pieces:
            source, target = int(own_sources[1, 0, 0]), int(own_targets[1, 0, 0])
            self.groups[source].read = True
            self.blocks.append(
                Block(
                    source,
                    target,
                    name,
                    kind=kind,
                    view=own_view,
                    groups=own_sources.shape[1],
                    kernel=kernel,
                    source_nodes=as_nodes(own_sources[0].flatten() - self.groups[source].start),
                    target_nodes=as_nodes(own_targets[0].flatten() - self.groups[target].start),
                    tied=own_view is not None and self.place(name, own_view),
                )
            )

    def ends(self, neurons: Tensor, groups: int) -> Tensor:
        """Ids, and the groups in which the neurons are: (2, parts of a block, neurons of a part)."""
        return torch.stack([neurons, self.places(neurons)]).view(2, groups, -1)

    def give_bias(self, ids: Tensor, slot: tuple[str, Tensor]) -> None:
        """Make a parameter of one number per neuron the bias of a new group."""
        group = self.groups[self.group_of(int(ids[0]))]
        if group.bias is not None:
            raise self.fail(f"parameter {slot[0]} would be a second bias of neurons that have {group.bias[0]}")
        group.bias = slot[0], self.view(*slot)
        group.tied = self.place(*group.bias)

    # Parameters

    def view(self, name: str, values: Tensor) -> View:
        """Which elements of a parameter these are."""
        if values.untyped_storage()._cdata != self.slots[name].untyped_storage()._cdata:
            raise self.fail(f"parameter {name} is rearranged into new memory before it is used")
        strides = list(values.stride())
        for d in reversed(range(values.dim())):
            if values.shape[d] == 1:  # of no effect: always the same
                strides[d] = values.shape[d + 1] * strides[d + 1] if d + 1 < values.dim() else 1
        return View(tuple(values.shape), tuple(strides), values.storage_offset())

    def place(self, name: str, view: View) -> bool:
        """Give elements of a parameter their place on the graph, unless they have one from an earlier use.

        Returns:
            whether they have.

        Raises:
            TraceError: some of them have, others not; or one occurs twice.
        """
        count = self.slots[name].numel()
        if any(stride == 0 and n > 1 for n, stride in zip(view.size, view.stride, strict=True)):
            raise self.fail(f"parameter {name} is repeated before it is used")
        if name not in self.placed and math.prod(view.size) == count:
            self.placed[name] = None  # all of it: no need to look at every element
            return False
        if name not in self.placed:
            self.placed[name] = torch.zeros(count, dtype=torch.bool)
        if self.placed[name] is None:
            return True
        places = view(self.placed[name], 0)
        tied = bool(places.any())
        if tied and not places.all():
            raise self.fail(f"parameter {name} is used in parts that overlap")
        places.fill_(True)
        return tied

    # Values

    def activation(
        self, shape: Sequence[int], axes: Sequence[Space], ids: Tensor | None, function: Expression = X
    ) -> Value:
        ids = None if ids is None else collapse(ids)
        self.tensors.append(tuple(axes))
        return Value(tuple(shape), list(axes), ids, source=self.node, function=function)

    def neurons(self, value: Value, axis: int) -> Tensor:
        """Ids of the neurons that hold an activation of which `axis` runs over neurons, for what reads them."""
        return self.through(self.sums(value, axis), value.function)

    def sums(self, value: Value, axis: int) -> Tensor:
        """Ids of the neurons to whose sums `value.function` was applied; an input's are made when it is first read."""
        if value.ids is not None:
            return value.ids
        if value.parent is not None:
            parent, order = value.parent
            return self.sums(parent, order[axis]).permute(order)
        axis %= len(value.shape)
        if axis not in value.made:
            shape = [1] * len(value.shape)
            shape[axis] = value.shape[axis]
            value.made[axis] = self.new_neurons(value.shape[axis], "input").view(shape)
        return value.made[axis]

    def same(self, value: Value, axes: Sequence[Space] | None = None) -> Value:
        """An activation after an operator that mixes numbers of the same neurons, or changes each in its own way."""
        axes = value.axes if axes is None else axes
        self.tensors.append(tuple(axes))
        return replace(value, axes=list(axes), source=self.node, region=None)

    def applied(self, value: Value, function: Expression) -> Value:
        """An activation after an operator that does the same to every number: a function of the numbers at `origin`."""
        return replace(self.same(value), function=function, region=value.origin)


SLICE_SCATTER = torch.ops.aten.slice_scatter.default


def cut_edges(
    sources: Tensor, targets: Tensor, view: View | None, axis: int
) -> Iterator[tuple[Tensor, Tensor, View | None]]:
    """Cut edges where the neurons at their ends change groups: along parts (axis 0), targets (1) or sources (2)."""
    # after a cut along parts, all parts of a piece change groups at the same places as the first
    groups = {0: torch.cat([sources[1], targets[1]], 1), 1: targets[1, :1].T, 2: sources[1, :1].T}[axis]
    changes = torch.nonzero((groups[1:] != groups[:-1]).any(1)).flatten() + 1
    for start, end in pairwise([0, *changes.tolist(), len(groups)]):
        yield (
            sources if axis == 1 else sources.narrow(1 if axis == 0 else 2, start, end - start),
            targets if axis == 2 else targets.narrow(1 if axis == 0 else 2, start, end - start),
            None if view is None else view.narrow(axis, start, end - start),
        )


def as_nodes(indices: Tensor) -> range | tuple[int, ...]:
    """Indices as a range where they are consecutive."""
    first, count = int(indices[0]), len(indices)
    if torch.equal(indices, torch.arange(first, first + count)):
        return range(first, first + count)
    return tuple(indices.tolist())


def collapse(ids: Tensor) -> Tensor:
    """Give axes along which the neurons do not change the length 1."""
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1 and (ids.stride(dim) == 0 or bool((ids == ids.narrow(dim, 0, 1)).all())):
            ids = ids.narrow(dim, 0, 1)
    return ids


def constant_axes(values: Tensor) -> list[Space]:
    """A constant pins the axes along which it varies."""
    axes = []
    for dim, size in enumerate(values.shape):
        varies = values.numel() > 0 and not bool((values == values.narrow(dim, 0, 1)).all())
        axes.append(pinned_leaf(size) if varies else uniform(size))
    return axes


def applied(operator: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Apply:
    """An operator's result as an expression of its operands'."""

    def plain(x: Any) -> Any:
        if isinstance(x, Value):
            return x.expression
        return tuple(plain(y) for y in x) if isinstance(x, (list, tuple)) else x

    return Apply(operator, plain(tuple(arguments)), tuple((name, plain(value)) for name, value in keywords.items()))
