"""The end of reading: groups that are read through one function take its name, and what is left is a wiring."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from ngcore.graph.structure import Block, Group, Reference, Step
from ngcore.graph.symmetry.group import Symmetry
from ngcore.graph.symmetry.spaces import resolve
from ngcore.graph.tracing.expressions import name_of
from ngcore.graph.tracing.ledgers import as_nodes
from ngcore.graph.tracing.reader import Reader, TraceError
from ngcore.graph.tracing.values import NO_NEURON, Activation, Computed, Constant, Parameter, Unread, Value, none
from ngcore.graph.wiring import Wiring


@dataclass(frozen=True)
class Left:
    """A group that is left when reading ends: its number while reading, its activation, which of its neurons are."""

    group: int
    activation: str
    nodes: Tensor


def left_groups(reader: Reader) -> list[Left]:
    """The groups that are left, copies behind their originals.

    A group that is read through one function alone, and not bare, takes the place of its copy; otherwise each function
    keeps a copy of the neurons that are read through it.
    """
    read = _read_nodes(reader)
    copies: dict[int, list[Left]] = {}
    for g, group in enumerate(reader.groups):
        if group.copy is not None and len(read[g]):
            original, function = group.copy
            copies.setdefault(original, []).append(Left(g, name_of(function), read[g]))
    left = []
    for g, group in enumerate(reader.groups):
        own = copies.get(g, [])
        if group.copy is None and len(own) == 1 and not len(read[g]):
            left.append(Left(g, own[0].activation, torch.arange(group.size)))
        elif group.copy is None:
            left += [Left(g, "identity", torch.arange(group.size)), *own]
    return left


def _read_nodes(reader: Reader) -> list[Tensor]:
    """For every group its neurons that are outputs or have edges to others than their copies."""
    read = [torch.zeros(group.size, dtype=torch.bool) for group in reader.groups]
    for block in reader.blocks:
        if not _copies(reader, block):
            read[block.source][list(block.source_nodes)] = True
    for ids in reader.returned:
        for g in reader.groups.numbers(ids):
            start = reader.groups[g].start
            read[g][ids[reader.groups.places(ids) == g] - start] = True
    return [nodes.nonzero().flatten() for nodes in read]


def _copies(reader: Reader, block: Block) -> bool:
    copy = reader.groups[block.target].copy
    return copy is not None and copy[0] == block.source


class Numbers:
    """New numbers of groups and neurons: a copy that is not left has those of its original."""

    def __init__(self, reader: Reader, left: Sequence[Left]) -> None:
        self.reader = reader
        self.group = torch.full([len(reader.groups)], -1)
        for number, own in enumerate(left):
            self.group[own.group] = number
        starts = [0, *accumulate(len(own.nodes) for own in left)]
        self.neuron = torch.empty(sum(group.size for group in reader.groups), dtype=torch.int64)
        for g, group in enumerate(reader.groups):  # originals come before their copies
            new, original = self.neuron[group.start :][: group.size], g if group.copy is None else group.copy[0]
            new.copy_(self.neuron[reader.groups[original].start :][: group.size])
            if self.group[g] >= 0:
                own = left[self.group[g]]
                new[own.nodes] = starts[self.group[g]] + torch.arange(len(own.nodes))
            else:
                self.group[g] = self.group[original]
        self.starts = starts

    def ids(self, value: Value) -> Tensor | None:
        """The neurons of a value at the end of reading: an input's may have been made later."""
        if isinstance(value, Constant):
            return none(len(value.shape))
        ids = _ids(value) if isinstance(value, Computed) else None
        if ids is None:
            return None
        ids = self.reader.through(ids, value.function, make=False)
        return torch.where(ids == NO_NEURON, ids, self.neuron[ids])

    def block(self, block: Block) -> Block:
        """Edges with the numbers of what is left, from and to all of the neurons that are left of a copy."""
        ends = []
        for g, nodes in ((block.source, block.source_nodes), (block.target, block.target_nodes)):
            number = int(self.group[g])
            new = self.neuron[self.reader.groups[g].start + torch.tensor(list(nodes))] - self.starts[number]
            size = self.starts[number + 1] - self.starts[number]
            ends.append((number, None if torch.equal(new, torch.arange(size)) else as_nodes(new)))
        (source, sources), (target, targets) = ends
        view = (
            None
            if block.weight is not None and block.view == self.reader.parameters.as_block(block.weight)
            else block.view
        )
        return replace(block, source=source, target=target, source_nodes=sources, target_nodes=targets, view=view)


def _ids(value: Computed) -> Tensor | None:
    match value:
        case Activation():
            return value.ids
        case Unread(parent=(parent, order)):
            known = _ids(parent)
            return None if known is None else known.permute(order)
    made = list(value.made.values())
    return made[0] if len(made) == 1 else None


def left_blocks(reader: Reader, left: Sequence[Left], numbers: Numbers) -> tuple[list[Block], dict[fx.Node, range]]:
    """The edges that are left, and which of them every operator made; those into copies come before its own."""
    nodes = {own.group: own.nodes for own in left}
    blocks: list[Block] = []
    made = {}
    for node, (_, own, _) in reader.read.items():
        found = [reader.blocks[b] for b in own]
        for block in found:
            if _copies(reader, block) and block.target in nodes:
                kept = as_nodes(nodes[block.target])
                block = replace(block, groups=len(kept), source_nodes=kept, target_nodes=kept)
                blocks.append(numbers.block(block))
        first = len(blocks)
        blocks += [numbers.block(block) for block in found if not _copies(reader, block)]
        made[node] = range(first, len(blocks))
    return blocks, made


def closed(reader: Reader, exported: torch.export.ExportedProgram) -> Wiring:
    """Finish: activations, outputs, layers, names."""
    left = left_groups(reader)
    numbers = Numbers(reader, left)
    blocks, made = left_blocks(reader, left, numbers)
    groups = _groups(reader, left, numbers, blocks)
    aliases = {name: owner for name, owner in reader.owners.items() if name != owner}
    everything = exported.state_dict
    used = {block.weight for block in blocks} | {group.bias for group in groups}
    shapes = {name: tuple(everything[name].shape) for name in reader.parameters.axes if name in used}
    missing = reader.parameters.missing()
    if missing is not None:
        raise TraceError(f"parameter {missing[0]} of shape {shapes[missing[0]]} has {missing[1]} places on the graph")
    axes = {name: tuple(map(resolve, own)) for name, own in reader.parameters.axes.items()}
    return Wiring(
        tuple(groups),
        tuple(blocks),
        parameters=tuple(shapes.items()),
        aliases=tuple(aliases.items()),
        others=tuple(name for name in everything if name not in used and name not in aliases),
        symmetry=Symmetry(axes | {alias: axes[name] for alias, name in aliases.items()}, reader.tensors),
        steps=_steps(reader, exported, numbers, made),
    )


def _groups(reader: Reader, left: Sequence[Left], numbers: Numbers, blocks: Sequence[Block]) -> list[Group]:
    outputs = {int(numbers.group[g]) for ids in reader.returned for g in reader.groups.numbers(ids)}
    parents: list[set[int]] = [set() for _ in left]
    for block in blocks:
        parents[block.target].add(block.source)
    groups: list[Group] = []
    for g, own in enumerate(left):
        group = reader.groups[own.group]
        layer = 1 + max((groups[p].layer for p in parents[g] if p < g), default=-1)
        role = "output" if g in outputs and group.role == "hidden" else group.role
        bias, view = group.bias or (None, None)
        view = None if bias is not None and view == reader.parameters.as_block(bias) else view
        groups.append(
            Group(
                len(own.nodes), role, layer, own.activation, bias, view, group.where, group.tied, group.locations
            )
        )  # fmt: skip
    return groups


def _steps(
    reader: Reader, exported: torch.export.ExportedProgram, numbers: Numbers, made: dict[fx.Node, range]
) -> tuple[Step, ...]:
    """The operators as they were read, with the neurons behind their results."""
    place = {node: Reference(i) for i, node in enumerate(reader.read)}
    wanted = set(exported.graph_signature.user_outputs)
    steps = []
    for node, (value, _, where) in reader.read.items():
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        ids = numbers.ids(first) if isinstance(first, Value) else None
        parameter = first.name if isinstance(first, Parameter) else None
        match node.op:
            case "placeholder":
                given, arguments = _given(exported, node, value)
                steps.append(Step(given, arguments, ids=ids, parameter=parameter))
            case "output":
                returned = [out for out in node.args[0] if isinstance(out, fx.Node) and out.name in wanted]
                steps.append(Step("output", tuple(place[out] for out in returned)))
            case _:
                name = "getitem" if node.target is operator.getitem else str(node.target)
                arguments, keywords = fx.node.map_arg((node.args, dict(node.kwargs)), place.__getitem__)
                steps.append(Step(name, tuple(arguments), keywords, ids, made[node], parameter, where))
    return tuple(steps)


def _given(exported: torch.export.ExportedProgram, node: fx.Node, value: Any) -> tuple[str, tuple[Any, ...]]:
    """What a step stands for that is not computed: its kind, and its name, shape or number."""
    match value:
        case Parameter():
            return "parameter", (value.name,)
        case Constant():
            buffer = exported.graph_signature.inputs_to_buffers.get(node.name)
            return ("buffer", (buffer,)) if buffer in exported.state_dict else ("constant", (value.numbers,))
        case Value():
            return "input", (node.name, value.shape)
    return "constant", (value,)
