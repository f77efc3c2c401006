"""What rules read operators with: it makes neurons, edges and values, and knows the operator that is being read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ngcore.graph.structure import Role
from ngcore.graph.symmetry.spaces import Space, pin
from ngcore.graph.tracing.expressions import Expression, X, compose, name_of
from ngcore.graph.tracing.ledgers import BlockLedger, NeuronLedger, ParameterLedger
from ngcore.graph.tracing.values import NO_NEURON, Activation, Computed, Unread, Value, collapse


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
    """Walks an exported graph and collects groups, blocks, parameters and the spaces of all tensors.

    Attributes:
        owners: the first name of every parameter.
        tensors: the spaces of all tensors' axes.
        vocabularies: groups of inputs that stand for entries of an embedding or positions.
        copies: groups through which others are read, by the group that is read and the name of the function.
        returned: the neurons that the network returns.
        node: the operator that is being read.
        read: what became of every operator: its value, the blocks that it made, and where it is.
    """

    module: nn.Module
    owners: dict[str, str]
    groups: NeuronLedger = field(default_factory=NeuronLedger)
    blocks: BlockLedger = field(default_factory=BlockLedger)
    parameters: ParameterLedger = field(default_factory=ParameterLedger)
    tensors: list[tuple[Space, ...]] = field(default_factory=list)
    vocabularies: dict[Any, Tensor] = field(default_factory=dict)
    copies: dict[tuple[int, str], int] = field(default_factory=dict)
    returned: list[Tensor] = field(default_factory=list)
    node: fx.Node | None = None
    read: dict[fx.Node, tuple[Any, range, str]] = field(default_factory=dict)

    # The operator that is being read

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

    # Neurons and edges

    def new_neurons(self, size: int, role: Role = "hidden") -> Tensor:
        """A new group; its ids, (size,)."""
        return self.groups.new(size, role, self.where)

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
        self.blocks.connect(self.groups, self.parameters, sources, targets, kind, slot, groups, kernel)

    def give_bias(self, ids: Tensor, slot: tuple[str, Tensor]) -> None:
        """Make a parameter of one number per neuron the bias of a new group."""
        group = self.groups.of(int(ids[0]))
        if group.bias is not None:
            raise self.fail(f"parameter {slot[0]} would be a second bias of neurons that have {group.bias[0]}")
        group.bias = slot[0], self.parameters.view(*slot)
        group.tied = self.parameters.place(*group.bias)

    def bare(self, ids: Tensor, source: fx.Node | None) -> bool:
        """Whether these neurons are still nothing but sums that only the operator being read will see."""
        groups = [self.groups[g] for g in self.groups.numbers(ids)]
        used_once = source is not None and sum(user.target is not SLICE_SCATTER for user in source.users) <= 1
        return (
            used_once
            and bool((ids != NO_NEURON).all())
            and all(not group.read and group.copy is None and group.role == "hidden" for group in groups)
        )

    # Functions of sums

    def through(self, ids: Tensor, function: Expression, make: bool = True) -> Tensor:
        """The neurons that hold a function of these neurons' sums: copies, made once per function.

        Reading ends with a group as its own only copy where nothing else reads it: see `closing`. Where copies are not
        to be made, and there are none, the neurons themselves.
        """
        if name_of(function) == "identity":
            return ids
        shift = torch.zeros(len(self.groups), dtype=torch.int64)
        for g in self.groups.numbers(ids):
            parent, own = self.groups[g].copy or (g, X)
            whole = compose(function, own)
            if name_of(whole) == "identity":
                shift[g] = self.groups[parent].start - self.groups[g].start
            elif make or (parent, name_of(whole)) in self.copies:
                shift[g] = self.groups[self._copy(parent, whole)].start - self.groups[g].start
        return torch.where(ids == NO_NEURON, ids, ids + shift[self.groups.places(ids)])

    def _copy(self, parent: int, function: Expression) -> int:
        key = parent, name_of(function)
        if key not in self.copies:
            group = self.groups[parent]
            fresh = self.groups.new(group.size, "hidden", group.where)
            self.copies[key] = len(self.groups) - 1
            self.groups[-1].copy = parent, function
            self.connect(torch.arange(group.start, group.start + group.size), fresh, "residual", groups=group.size)
        return self.copies[key]

    # Values

    def activation(
        self, shape: Sequence[int], axes: Sequence[Space], ids: Tensor | None, function: Expression = X
    ) -> Computed:
        """A value of these neurons; of an input that has none yet where `ids` is None."""
        self.tensors.append(tuple(axes))
        if ids is None:
            return Unread(tuple(shape), list(axes), self.node, function)
        return Activation(tuple(shape), list(axes), self.node, function, ids=collapse(ids))

    def neurons(self, value: Computed, axis: int) -> Tensor:
        """Ids of the neurons that hold an activation of which `axis` runs over neurons, for what reads them."""
        return self.through(self.sums(value, axis), value.function)

    def sums(self, value: Computed, axis: int) -> Tensor:
        """Ids of the neurons to whose sums `value.function` was applied; an input's are made when it is first read."""
        match value:
            case Activation():
                return value.ids
            case Unread(parent=(parent, order)):
                return self.sums(parent, order[axis]).permute(order)
        axis %= len(value.shape)
        if axis not in value.made:
            shape = [1] * len(value.shape)
            shape[axis] = value.shape[axis]
            value.made[axis] = self.new_neurons(value.shape[axis], "input").view(shape)
        return value.made[axis]

    def same(self, value: Computed, axes: Sequence[Space] | None = None) -> Computed:
        """An activation after an operator that mixes numbers of the same neurons, or changes each in its own way."""
        axes = value.axes if axes is None else axes
        self.tensors.append(tuple(axes))
        return replace(value, axes=list(axes), source=self.node, region=None)

    def applied(self, value: Computed, function: Expression) -> Computed:
        """An activation after an operator that does the same to every number: a function of the numbers at `origin`."""
        return replace(self.same(value), function=function, region=value.origin)

    def give_back(self, value: Value) -> None:
        """A value that the network returns: its order is the network's own."""
        pin(*value.axes)
        if isinstance(value, Activation):
            self.returned.append(self.neurons(value, -1))


SLICE_SCATTER = torch.ops.aten.slice_scatter.default
