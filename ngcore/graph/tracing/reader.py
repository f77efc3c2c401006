"""Reading the wiring of any PyTorch network: its operators, walked once with neurons in place of activations."""

from __future__ import annotations

import math
import operator
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ngcore.graph.structure import Block, Group, Reference, Role, Step, View
from ngcore.graph.symmetry.group import Symmetry
from ngcore.graph.symmetry.spaces import Space, pin, pinned_leaf, reading, resolve, uniform
from ngcore.graph.wiring import Wiring

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
        name: of a buffer, in the state dict.
    """

    shape: tuple[int, ...]
    axes: list[Space]
    ids: Tensor | None = None
    made: dict[int, Tensor] = field(default_factory=dict)
    slot: tuple[str, Tensor] | None = None
    constant: Tensor | None = None
    source: fx.Node | None = None
    parent: tuple[Value, list[int]] | None = None
    name: str = ""

    @property
    def kind(self) -> str:
        return "parameter" if self.slot is not None else "constant" if self.constant is not None else "activation"


@dataclass
class Neurons:
    """A group of neurons while the network is being read."""

    start: int
    size: int
    role: Role
    where: str
    activation: str = "identity"
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
        groups = self.groups_of(ids)
        used_once = source is not None and sum(user.target is not SLICE_SCATTER for user in source.users) <= 1
        return (
            used_once
            and bool((ids != NO_NEURON).all())
            and all(
                not self.groups[g].read and self.groups[g].activation == "identity" and self.groups[g].role == "hidden"
                for g in groups
            )
        )

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
        return View.of(values)

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

    def activation(self, shape: Sequence[int], axes: Sequence[Space], ids: Tensor | None) -> Value:
        value = Value(tuple(shape), list(axes), None if ids is None else collapse(ids), source=self.node)
        self.tensors.append(tuple(axes))
        return value

    def neurons(self, value: Value, axis: int) -> Tensor:
        """Ids of an activation of which `axis` runs over neurons; an input's are made when it is first read."""
        if value.ids is not None:
            return value.ids
        if value.parent is not None:
            parent, order = value.parent
            return self.neurons(parent, order[axis]).permute(order)
        axis %= len(value.shape)
        if axis not in value.made:
            shape = [1] * len(value.shape)
            shape[axis] = value.shape[axis]
            value.made[axis] = self.new_neurons(value.shape[axis], "input").view(shape)
        return value.made[axis]

    def same(self, value: Value, axes: Sequence[Space] | None = None) -> Value:
        """An activation after an operator that acts on every number by itself: of the same neurons."""
        axes = value.axes if axes is None else axes
        self.tensors.append(tuple(axes))
        return replace(value, axes=list(axes), source=self.node)


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


def trace(module: nn.Module, *example_inputs: Any, **example_keywords: Any) -> Wiring:
    """The wiring of a network, read from the operators that it runs on example inputs.

    Choose examples with at least three positions along sequences and odd sizes along images: an axis of length 1
    hides what happens along it. The network is read in evaluation mode; its weights do not matter.

    Raises:
        TraceError: the network can't be exported, or an operator has no rule; the message says which and where.
    """
    with _evaluation_mode(module), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch.export's own
        try:
            exported = torch.export.export(module, example_inputs, example_keywords, strict=False)
            exported = exported.run_decompositions({})
        except Exception as error:
            raise TraceError(f"torch.export can't read {type(module).__name__}: {error}") from error
    reader = Reader(module, owners=_owners(module))
    values = _read(reader, exported)
    return _wiring(reader, exported, values)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, training in modes:
            inner.training = training


def _owners(module: nn.Module) -> dict[str, str]:
    """The first name of every parameter: tied ones have several."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _read(reader: Reader, exported: torch.export.ExportedProgram) -> list[Value]:
    """Walk the operators; the values that the network returns."""
    values: dict[fx.Node, Any] = {}
    signature = exported.graph_signature
    returned: list[Value] = []
    for node in exported.graph.nodes:
        reader.node = node
        blocks = len(reader.blocks)
        if node.op == "placeholder":
            values[node] = _placeholder(reader, exported, node)
        elif node.op == "call_function":
            values[node] = _call(reader, node, values)
            for value in values[node] if isinstance(values[node], (tuple, list)) else [values[node]]:
                if isinstance(value, Value) and value.source is None:
                    value.source = node
        elif node.op == "output":
            wanted = set(signature.user_outputs)
            returned = [values[out] for out in node.args[0] if isinstance(out, fx.Node) and out.name in wanted]
        else:
            raise reader.fail(f"no rule for {node.op} nodes")
        reader.read[node] = values.get(node), range(blocks, len(reader.blocks)), reader.where
    return returned


def _placeholder(reader: Reader, exported: torch.export.ExportedProgram, node: fx.Node) -> Any:
    signature = exported.graph_signature
    example = node.meta.get("val")
    name = signature.inputs_to_parameters.get(node.name)
    if name is not None:
        name = reader.owners.get(name, name)
        if name not in reader.axes:
            reader.axes[name] = tuple(Space(n) if n != 1 else uniform(1) for n in example.shape)
            reader.slots[name] = torch.empty(example.shape, device="meta")
        return Value(tuple(example.shape), list(reader.axes[name]), slot=(name, reader.slots[name]))
    buffer = signature.inputs_to_buffers.get(node.name)
    lifted = signature.inputs_to_lifted_tensor_constants.get(node.name)
    if buffer is not None or lifted is not None:
        found = exported.constants if lifted is not None or buffer in signature.non_persistent_buffers else None
        constant = found[lifted or buffer] if found is not None else exported.state_dict[buffer]
        return Value(tuple(constant.shape), constant_axes(constant), constant=constant, source=node, name=buffer or "")
    if not isinstance(example, Tensor):
        return example
    return Value(tuple(example.shape), [pinned_leaf(n) for n in example.shape], source=node)


def _call(reader: Reader, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    arguments = fx.node.map_arg(node.args, values.__getitem__)
    keywords = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.target is operator.getitem:
        return arguments[0][arguments[1]]
    found: list[Value] = []
    fx.node.map_aggregate((arguments, keywords), lambda x: found.append(x) if isinstance(x, Value) else None)
    if all(value.kind == "constant" for value in found):
        return _evaluate(node, arguments, keywords)
    name = reader.operator
    if name not in RULES:
        raise reader.fail(
            f"no rule for the operator {name}; register one with @ngcore.graph.rule('{name}'), "
            "as ngcore/graph/rules/ does"
        )
    token = reading.set(f"{name} in '{reader.named}'")
    try:
        return RULES[name](reader, *arguments, **keywords)
    except TraceError:
        raise
    except Exception as error:
        raise reader.fail(f"the rule for {name} failed: {type(error).__name__}: {error}") from error
    finally:
        reading.reset(token)


def _evaluate(node: fx.Node, arguments: Any, keywords: Any) -> Any:
    """Operators on constants alone are run."""

    def numbers(x: Any) -> Any:
        return x.constant if isinstance(x, Value) else x

    def wrap(x: Any) -> Any:
        return Value(tuple(x.shape), constant_axes(x), constant=x, source=node) if isinstance(x, Tensor) else x

    result = node.target(
        *fx.node.map_aggregate(arguments, numbers),
        **{k: fx.node.map_aggregate(v, numbers) for k, v in keywords.items()},
    )
    return [wrap(x) for x in result] if isinstance(result, (tuple, list)) else wrap(result)


def _steps(reader: Reader, exported: torch.export.ExportedProgram) -> tuple[Step, ...]:
    """The operators as they were read, with the neurons behind their results."""
    place = {node: Reference(i) for i, node in enumerate(reader.read)}
    wanted = set(exported.graph_signature.user_outputs)
    steps = []
    for node, (value, blocks, where) in reader.read.items():
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        known = first if isinstance(first, Value) else None
        parameter = None if known is None or known.slot is None else known.slot[0]
        ids = None if known is None else _ids(reader, known)
        if node.op == "placeholder":
            given, arguments = _given(exported, node, value)
            steps.append(Step(given, arguments, ids=ids, parameter=parameter))
        elif node.op == "output":
            returned = [out for out in node.args[0] if isinstance(out, fx.Node) and out.name in wanted]
            steps.append(Step("output", tuple(place[out] for out in returned)))
        else:
            name = "getitem" if node.target is operator.getitem else str(node.target)
            arguments, keywords = fx.node.map_arg((node.args, dict(node.kwargs)), place.__getitem__)
            steps.append(Step(name, tuple(arguments), keywords, ids, blocks, parameter, where))
    return tuple(steps)


def _given(exported: torch.export.ExportedProgram, node: fx.Node, value: Any) -> tuple[str, tuple[Any, ...]]:
    """What a step stands for that is not computed: its kind, and its name, shape or number."""
    if not isinstance(value, Value):
        return "constant", (value,)
    if value.slot is not None:
        return "parameter", (value.slot[0],)
    if value.constant is None:
        return "input", (node.name, value.shape)
    buffer = exported.graph_signature.inputs_to_buffers.get(node.name)
    return ("buffer", (buffer,)) if buffer in exported.state_dict else ("constant", (value.constant,))


def _ids(reader: Reader, value: Value) -> Tensor | None:
    """The neurons of a value at the end of reading: an input's may have been made later."""
    if value.constant is not None:
        return torch.full([1] * len(value.shape), NO_NEURON)
    if value.ids is not None or value.slot is not None:
        return value.ids
    if value.parent is not None:
        parent, order = value.parent
        known = _ids(reader, parent)
        return None if known is None else known.permute(order)
    made = list(value.made.values())
    return made[0] if len(made) == 1 else None


def _wiring(reader: Reader, exported: torch.export.ExportedProgram, returned: list[Value]) -> Wiring:
    """Close the books: outputs, layers, names."""
    outputs: set[int] = set()
    for value in returned:
        pin(*value.axes)
        if value.ids is not None:
            outputs |= set(reader.groups_of(value.ids))
    parents: list[set[int]] = [set() for _ in reader.groups]
    for block in reader.blocks:
        parents[block.target].add(block.source)
    layers: list[int] = []
    for g in range(len(reader.groups)):
        layers.append(1 + max((layers[p] for p in parents[g] if p < g), default=-1))
    groups = []
    for g, group in enumerate(reader.groups):
        role = "output" if g in outputs and group.role == "hidden" else group.role
        bias, view = group.bias or (None, None)
        groups.append(
            Group(group.size, role, layers[g], group.activation, bias, view, group.where, group.tied, group.locations)
        )
    aliases = {name: owner for name, owner in reader.owners.items() if name != owner}
    everything = exported.state_dict
    used = {block.weight for block in reader.blocks} | {group.bias for group in groups}
    shapes = {name: tuple(everything[name].shape) for name in reader.axes if name in used}
    for name, placed in reader.placed.items():
        if placed is not None and not placed.all():
            raise TraceError(f"parameter {name} of shape {shapes[name]} has {int(placed.sum())} places on the graph")
    axes = {name: tuple(map(resolve, own)) for name, own in reader.axes.items()}
    return Wiring(
        tuple(groups),
        tuple(reader.blocks),
        parameters=tuple(shapes.items()),
        aliases=tuple(aliases.items()),
        others=tuple(name for name in everything if name not in used and name not in aliases),
        symmetry=Symmetry(axes | {alias: axes[name] for alias, name in aliases.items()}, reader.tensors),
        steps=_steps(reader, exported),
    )
