"""Batches of neural graphs, of one architecture or of many, in one form.

A batch is a number of copies of a union of networks. Networks that share a wiring are copies of it: where its neurons
and blocks lie is the same for all and known beforehand, so that shapes are static. Networks of several wirings are one
copy of their union, in which blocks of one shape are stacked, whichever networks they come from. Blocks are complete
bipartite: no edge is padded, none is scattered, and nothing of a network depends on its neighbours in the batch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ngcore.graph.frame import Frame
from ngcore.graph.pyg import kernel_places
from ngcore.graph.structure import Block
from ngcore.graph.wiring import NeuralGraph, Wiring

FAR = 8  # blocks from the outputs: more than models have layers
KernelKind = tuple[tuple[int, ...], bool]  # what a block's edges look like: their kernel, whether they have a weight


@dataclass(frozen=True)
class Ends:
    """The neurons at one end of a stack's blocks: rows `nodes` of one of the batch's node tensors, or all of it."""

    tensor: int
    nodes: Int[Tensor, "blocks n"] | None = None

    def of(self, states: Sequence[Float[Tensor, "copies _ width"]]) -> Float[Tensor, "_ _ width"]:
        """Their states."""
        own = states[self.tensor]
        return own if self.nodes is None else own[:, self.nodes].flatten(0, 1)

    def select(self, blocks: slice | Tensor) -> Ends:
        """Of some of the blocks."""
        return self if self.nodes is None else Ends(self.tensor, self.nodes[blocks])


@dataclass(frozen=True)
class Stack:
    """Blocks of one shape, each source to each target, those whose targets are nearest to the outputs first.

    Attributes:
        near_targets, near_sources: how many blocks have targets, or sources, that are at most 0, 1, 2, ... blocks from
            an output, on the shortest way in any direction; up to `FAR`, which stands for all others.

    Shapes:
        by_sources: (blocks,) their order by the distance of their sources; None where they stand in it
        slot: (blocks,) row of the weights' statistics, 0 for edges without a parameter
        present: (blocks, features) which features hold a number, the others are around a kernel; None for all
        weights: (copies, blocks, targets, sources, features of the frame), 0 where no number is present; with several
            channels a number, those of a feature side by side
    """

    targets: Ends
    sources: Ends
    near_targets: tuple[int, ...]
    near_sources: tuple[int, ...]
    by_sources: Int[Tensor, " blocks"] | None
    slot: Int[Tensor, " blocks"]
    present: Bool[Tensor, "blocks _"] | None
    weights: Float[Tensor, "copies blocks targets sources features"]


@dataclass(frozen=True)
class Nodes:
    """What a batch's nodes are, in the order of its node tensors.

    Shapes:
        slot, position, activation: (nodes,) rows of the frame's statistics and embeddings
        incoming, outgoing: (nodes,) numbers of edges
    """

    slot: Int[Tensor, " nodes"]
    position: Int[Tensor, " nodes"]
    activation: Int[Tensor, " nodes"]
    incoming: Float[Tensor, " nodes"]
    outgoing: Float[Tensor, " nodes"]


@dataclass(frozen=True)
class GraphBatch:
    """Neural graphs of networks of any architectures.

    Attributes:
        nodes: of one copy.
        tensors: how many nodes stand in each of the tensors between which messages run.
        alike: for each of these tensors, whether all its nodes have equally many edges.
        is_static: whether all networks are copies of one, so that nothing but their numbers varies.
        graphs: the networks by wiring, with their numbers in the batch.

    Shapes:
        parts: (parts of all networks,) place of each, in the order of networks, among the blocks of the stacks
        first_part: (networks,) of every network
        biases: (copies, nodes, channels), 0 where there is none
        network: (nodes,) which network of a copy a node belongs to; those of a network stand together, in its order
        inputs, outputs: (networks of a copy, inputs or outputs of the frame) its neurons, -1 for those that it lacks
        sizes: (networks of a copy,) numbers of nodes
    """

    frame: Frame
    nodes: Nodes
    tensors: tuple[int, ...]
    biases: Float[Tensor, "copies nodes channels"]
    stacks: tuple[Stack, ...]
    network: Int[Tensor, " nodes"]
    inputs: Int[Tensor, "union inputs"]
    outputs: Int[Tensor, "union outputs"]
    sizes: Int[Tensor, " union"]
    graphs: Sequence[tuple[Tensor, NeuralGraph]] = field(repr=False)
    alike: tuple[bool, ...] = (False,)
    is_static: bool = True
    parts: Int[Tensor, " parts"] | None = None
    first_part: Int[Tensor, " networks"] | None = None

    @property
    def copies(self) -> int:
        return len(self.biases)

    @property
    def num_networks(self) -> int:
        return self.copies * len(self.sizes)

    def split(self, states: Float[Tensor, "copies nodes width"]) -> tuple[Tensor, ...]:
        """States of all nodes as the tensors between which messages run."""
        return states.split(self.tensors, dim=1) if len(self.tensors) > 1 else (states,)

    def of_role(
        self, states: Float[Tensor, "copies nodes width"], role: Literal["input", "output"]
    ) -> Float[Tensor, "networks neurons width"]:
        """States of every network's input or output neurons; zeros for those that it lacks."""
        places = self.outputs if role == "output" else self.inputs
        found = states[:, places.clamp(min=0)].flatten(0, 1)
        return torch.where((places >= 0).repeat(self.copies, 1).unsqueeze(2), found, 0)

    def on_graphs(
        self, nodes: Float[Tensor, "copies nodes k"], edges: Sequence[Float[Tensor, "_ _ _ _"]]
    ) -> tuple[NeuralGraph, ...]:
        """Numbers for every node and edge as graphs, one for each of `graphs`; those of kernels' places alone stay.

        Shapes:
            edges: per stack, for every feature of the frame k numbers side by side
        """
        if self.is_static:
            ((_, graph),) = self.graphs
            own = tuple(x.unflatten(0, (self.copies, -1)) for x in edges)
            return (self._on_graph(graph.wiring, self.split(nodes), own),)
        starts = [0, *accumulate(len(x) for x in edges)]
        first = self.sizes.cumsum(0) - self.sizes
        found = []
        for rows, graph in self.graphs:
            wiring = graph.wiring
            index = first[rows].unsqueeze(1) + torch.arange(wiring.num_nodes, device=rows.device)
            own_nodes = nodes[0][index].split([group.size for group in wiring.groups], dim=1)
            own_edges, part = [], self.first_part[rows]
            for block in wiring.blocks:
                places = self.parts[part.unsqueeze(1) + torch.arange(block.groups, device=rows.device)]
                stack = bisect_right(starts, int(places[0, 0])) - 1  # parts of one block have one shape
                own_edges.append(edges[stack][places - starts[stack]])
                part = part + block.groups
            found.append(self._on_graph(wiring, own_nodes, own_edges))
        return tuple(found)

    def _on_graph(
        self, wiring: Wiring, nodes: Sequence[Tensor], edges: Sequence[Float[Tensor, "n _ _ _ _"]]
    ) -> NeuralGraph:
        own = []
        for block, values in zip(wiring.blocks, edges, strict=True):
            places = _places_of((block.kernel, block.weight is not None), self.frame, values.device)
            by_place = values.flatten(1, 2).unflatten(-1, (self.frame.features, -1))
            own.append(by_place.index_select(-2, places).flatten(-2))
        return NeuralGraph(wiring, tuple(nodes), tuple(own))

    def __repr__(self) -> str:
        of = f"{len(self.graphs)} architectures" if len(self.graphs) > 1 else "one architecture"
        return f"GraphBatch({self.num_networks} networks of {of}, {self.copies * len(self.network)} nodes)"


def batch_of(graph: NeuralGraph, frame: Frame) -> GraphBatch:
    """Networks of one wiring as a batch, without copying them.

    Shapes:
        graph: one batch axis; nodes and edges may have several channels a number, side by side

    Raises:
        ValueError: the wiring does not fit into the frame, or the graph has not one batch axis.
    """
    if graph.edges[0].dim() != 4:
        raise ValueError(
            f"a model reads graphs with one batch axis, of their networks, not {graph.edges[0].dim() - 3}: "
            "bind a list of state dicts, or one stacked along a first axis"
        )
    layout = _layout(graph.wiring, frame, graph.edges[0].device)
    channels = graph.nodes[0].shape[-1]
    stacks = tuple(
        replace(stack, weights=_in_window(edges.unflatten(1, (block.groups, -1)), places, frame, channels))
        for block, edges, stack, places in zip(
            graph.wiring.blocks, graph.edges, layout.stacks, layout.places, strict=True
        )
    )
    return GraphBatch(
        frame, layout.nodes, layout.tensors, torch.cat(graph.nodes, dim=1), stacks, layout.network, layout.inputs,
        layout.outputs, layout.sizes, ((torch.arange(graph.num_networks), graph),),
        layout.alike,
    )  # fmt: skip


def _in_window(weights: Tensor, places: Tensor | None, frame: Frame, channels: int) -> Tensor:
    """Numbers at their places in the window, zeros around them."""
    if places is None:
        return weights
    padded = weights.new_zeros(*weights.shape[:-1], frame.features, channels)
    return padded.index_copy(-2, places, weights.unflatten(-1, (-1, channels))).flatten(-2)


@dataclass(frozen=True)
class _Layout:
    """Where everything lies in a batch of one wiring; `stacks` without weights."""

    nodes: Nodes
    tensors: tuple[int, ...]
    alike: tuple[bool, ...]
    stacks: tuple[Stack, ...]
    places: tuple[Tensor | None, ...]
    network: Tensor
    inputs: Tensor
    outputs: Tensor
    sizes: Tensor


@lru_cache(maxsize=256)
def _layout(wiring: Wiring, frame: Frame, device: torch.device) -> _Layout:
    """Read once per wiring what its batches look like."""
    frame.check(wiring)
    hops = hops_to_outputs(wiring)
    stacks, places = [], []
    for block in wiring.blocks:
        check_kernel(block)
        inside = window_of((block.kernel, block.weight is not None), frame)
        found = inside >= 0
        slot = edge_slot(wiring, block, frame)
        stacks.append(
            Stack(
                targets=_ends(wiring, block.target, block.target_nodes, block.groups, device),
                sources=_ends(wiring, block.source, block.source_nodes, block.groups, device),
                near_targets=_near(block.groups, hops[block.target]),
                near_sources=_near(block.groups, hops[block.source]),
                by_sources=None,
                slot=torch.full((block.groups,), slot, device=device),
                present=None if found.all() else found.to(device).expand(block.groups, -1),
                weights=torch.empty(0, block.groups, 0, 0, frame.features, device=device),
            )
        )
        identity = torch.equal(inside, torch.arange(frame.features))
        places.append(None if identity else found.nonzero().squeeze(1).to(device))
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    add_nodes(columns, wiring, frame)
    tensors = tuple(group.size for group in wiring.groups)
    edges = torch.tensor([columns["incoming"], columns["outgoing"]]).split(tensors, dim=1)
    return _Layout(
        nodes=Nodes(**{f.name: torch.tensor(columns[f.name], device=device) for f in fields(Nodes)}),
        tensors=tensors,
        alike=tuple(bool((own == own[:, :1]).all()) for own in edges),
        stacks=tuple(stacks),
        places=tuple(places),
        network=torch.zeros(wiring.num_nodes, dtype=torch.long, device=device),
        inputs=torch.tensor(columns["inputs"], device=device),
        outputs=torch.tensor(columns["outputs"], device=device),
        sizes=torch.tensor([wiring.num_nodes], device=device),
    )


def _near(blocks: int, hops: int) -> tuple[int, ...]:
    """`Stack.near_targets` of blocks that are all equally far."""
    return (0,) * hops + (blocks,) * (FAR + 1 - hops)


def _ends(wiring: Wiring, group: int, nodes: Sequence[int] | None, parts: int, device: torch.device) -> Ends:
    size = wiring.groups[group].size
    if parts == 1 and (nodes is None or list(nodes) == list(range(size))):
        return Ends(group)
    return Ends(group, torch.tensor(list(range(size) if nodes is None else nodes), device=device).view(parts, -1))


def add_nodes(columns: dict[str, list[Any]], wiring: Wiring, frame: Frame) -> None:
    for role, count in (("input", frame.inputs), ("output", frame.outputs)):
        places = [wiring.offsets[g] + i for g in wiring.with_role(role) for i in range(wiring.groups[g].size)]
        columns[f"{role}s"].append(places + [-1] * (count - len(places)))
    columns["position"] += frame.positions_of(wiring)
    for group in wiring.groups:
        columns["slot"] += [frame.slot(group) if group.bias is not None else 0] * group.size
        columns["activation"] += [frame.activation(group)] * group.size
    sources, targets = torch.cat([wiring.edge_index(block) for block in wiring.blocks], dim=1)
    for name, ends in (("incoming", targets), ("outgoing", sources)):
        columns[name] += ends.bincount(minlength=wiring.num_nodes).float().tolist()


def edge_slot(wiring: Wiring, block: Block, frame: Frame) -> int:
    return frame.slot(wiring.groups[block.target], wiring.groups[block.source].kind) if block.weight is not None else 0


def block_shape(wiring: Wiring, block: Block) -> tuple[int, int]:
    """Targets and sources of each of a block's groups."""
    t, s = (
        (wiring.groups[group].size if nodes is None else len(nodes)) // block.groups
        for group, nodes in ((block.target, block.target_nodes), (block.source, block.source_nodes))
    )
    return t, s


def block_numbers(wiring: Wiring, block: Block) -> int:
    """How many numbers stand on a block's edges."""
    t, s = block_shape(wiring, block)
    return block.groups * t * s * math.prod(block.kernel)


def check_kernel(block: Block) -> None:
    """Raise a ValueError where an edge has several numbers that are no kernel."""
    width = math.prod(block.view.size[3:]) if block.view is not None else 1
    if width != math.prod(block.kernel):
        raise ValueError(f"parameter {block.weight} has {width} numbers an edge, but its kernel is {block.kernel}")


def hops_to_outputs(wiring: Wiring) -> list[int]:
    """For every group the number of blocks on the shortest way to an output group, in any direction, at most `FAR`."""
    outputs = wiring.with_role("output")
    hops = [0 if g in outputs else FAR for g in range(len(wiring.groups))]
    for _ in range(FAR):
        for block in wiring.blocks:
            near = min(hops[block.source], hops[block.target]) + 1
            hops[block.source], hops[block.target] = min(hops[block.source], near), min(hops[block.target], near)
    return hops


@lru_cache(maxsize=256)
def _places_of(kind: KernelKind, frame: Frame, device: torch.device) -> Int[Tensor, " numbers"]:
    """Where in the flattened window numbers lie, brought to a device once."""
    return (window_of(kind, frame) >= 0).nonzero().squeeze(1).to(device)


def window_of(kind: KernelKind, frame: Frame) -> Tensor:
    """For every place of the flattened window, which of an edge's numbers lies there, -1 for none."""
    kernel, is_weight = kind
    inside = torch.full((frame.features,), -1)
    first = is_weight and not kernel and frame.linear == "linear"
    places = torch.zeros(1, dtype=torch.long) if first else kernel_places(kernel, frame.window)
    inside[places] = torch.arange(math.prod(kernel))
    return inside
