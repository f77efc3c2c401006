"""Graphs of networks of many shapes, and batches of them.

Blocks are complete bipartite, so of all the blocks in a batch those of one shape stand as one dense stack, whichever
networks and layers they come from: no edge is padded, none is scattered, and nothing of a network depends on its
neighbours in the batch. A batch is put together by index arithmetic alone, without a loop over networks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ngcore.graph.pyg import Linear, kernel_places, largest_kernel
from ngcore.graph.structure import Block, Group
from ngcore.graph.wiring import NeuralGraph, Wiring

Kind = tuple[tuple[int, ...], bool]  # what edges of a block look like: their kernel, and whether they have a weight


@dataclass(frozen=True)
class Frame:
    """What graphs of several wirings have in common, so that one model reads them all.

    Args:
        window: kernels are centred in it.
        inputs, outputs: input and output neurons, each of which is told apart.
        layers: hidden layers, each of which is told apart.
        activations: names of the hidden neurons' activations.
        locations: places in space from which channels are flattened, each of which is told apart.
        linear: where weights without a kernel lie: at the window's centre, as of a 1x1 convolution ("convolution"), or
            at its first place ("linear"; paper, section 2.2). Edges without a parameter stay at the centre.
    """

    window: tuple[int, ...]
    inputs: int
    outputs: int
    layers: int
    activations: tuple[str, ...]
    locations: int = 0
    linear: Linear = "convolution"

    @classmethod
    def of(cls, wirings: Iterable[Wiring]) -> Frame:
        """The smallest frame that holds all of these wirings."""
        groups = [group for wiring in wirings for group in wiring.groups]
        blocks = [block for wiring in wirings for block in wiring.blocks]
        sizes = {role: max(group.size for group in groups if group.role == role) for role in ("input", "output")}
        hidden = [group for group in groups if group.role == "hidden"]
        return cls(
            window=largest_kernel(blocks),
            inputs=sizes["input"],
            outputs=sizes["output"],
            layers=max((group.layer for group in hidden), default=0),
            activations=tuple(sorted({group.activation for group in hidden})),
            locations=1 + max((place for group in hidden for place in group.locations or ()), default=-1),
        )

    @property
    def features(self) -> int:
        """Numbers on an edge."""
        return math.prod(self.window)

    def slot(self, group: Group) -> int:
        """Where a layer's weights and biases have their statistics: 0 for inputs, the last for outputs."""
        return {"input": 0, "output": self.layers + 1}.get(group.role, group.layer)

    def position(self, group: Group) -> list[int]:
        """Row of the positional embedding of every neuron: one per input and output neuron, one per hidden layer, one
        per location of flattened channels."""
        if group.locations is not None:
            return [self.inputs + self.layers + self.outputs + place for place in group.locations]
        if group.role == "hidden":
            return [self.inputs + group.layer - 1] * group.size
        first = 0 if group.role == "input" else self.inputs + self.layers
        return list(range(first, first + group.size))

    def activation(self, group: Group) -> int:
        """Row of the activation embedding; the last one for input and output neurons."""
        return self.activations.index(group.activation) if group.role == "hidden" else len(self.activations)

    def check(self, wiring: Wiring) -> None:
        """Raise a ValueError that says why a wiring does not fit."""
        for role in ("input", "output"):
            count = len(wiring.with_role(role))
            if count != 1:  # neurons of several would share rows of the positional embedding
                raise ValueError(f"a frame holds networks with one {role} layer, not {count}")
        for group in wiring.groups:
            where = f"layer {group.layer} of {[g.size for g in wiring.groups]}"
            if group.role == "hidden" and group.activation not in self.activations:
                known = ", ".join(self.activations)
                raise ValueError(f"unknown activation {group.activation!r} in {where}; the frame has {known}")
            if group.role == "hidden" and group.layer > self.layers:
                raise ValueError(f"{where} is deeper than the frame's {self.layers} hidden layers")
            if max(group.locations or (0,)) >= max(1, self.locations):
                raise ValueError(
                    f"{where} is flattened at {max(group.locations) + 1} locations, the frame has {self.locations}"
                )
            if group.role == "input" and group.size > self.inputs:
                raise ValueError(f"{where} has {group.size} input neurons, the frame {self.inputs}")
        outputs = sum(group.size for group in wiring.groups if group.role == "output")
        if outputs != self.outputs:
            raise ValueError(f"a network has {outputs} output neurons, the frame {self.outputs}")


@dataclass(frozen=True)
class Stack:
    """All blocks of one shape in a batch, each source to each target.

    Shapes:
        targets: (blocks, targets of a block) rows of the batch's nodes
        sources: (blocks, sources of a block)
        target_hops, source_hops: (blocks,) blocks on the shortest way from their groups to the outputs, any direction
        edges: which of the batch's edges, those of a block together, targets before sources
    """

    targets: Int[Tensor, "blocks t"]
    sources: Int[Tensor, "blocks s"]
    target_hops: Int[Tensor, " blocks"]
    source_hops: Int[Tensor, " blocks"]
    edges: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.targets), self.targets.shape[1], self.sources.shape[1]


@dataclass(frozen=True)
class GraphBatch:
    """Neural graphs of networks of any shapes.

    Shapes:
        biases, node_slot, position, activation, network: (nodes,) bias (0 where there is none), rows of the frame's
            statistics and embeddings, network that the neuron belongs to
        weights: (edges, features of the frame), 0 outside the kernels; `present` tells these zeros from weights
        edge_slot: (edges,) row of the statistics, 0 for edges without a parameter
        outputs: (networks, outputs) their output neurons
        sizes: (networks,) numbers of neurons; those of a network stand together, in the order of its wiring
    """

    frame: Frame
    biases: Float[Tensor, " nodes"]
    node_slot: Int[Tensor, " nodes"]
    position: Int[Tensor, " nodes"]
    activation: Int[Tensor, " nodes"]
    network: Int[Tensor, " nodes"]
    weights: Float[Tensor, "edges features"]
    present: Bool[Tensor, "edges features"]
    edge_slot: Int[Tensor, " edges"]
    stacks: tuple[Stack, ...]
    outputs: Int[Tensor, "networks outputs"]
    sizes: Int[Tensor, " networks"]

    @property
    def num_networks(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class _Layouts:
    """Where things lie in the graphs of all wirings, one after the other; `of_*` say where a wiring's own begin.

    A part is a block, or one of the groups of a block. Offsets count from the first number of a network.
    """

    node_slot: Tensor
    position: Tensor
    activation: Tensor
    output: Tensor  # (wirings, outputs) places of the output neurons
    num_nodes: Tensor  # (wirings,)
    first_node: Tensor
    num_parts: Tensor
    first_part: Tensor
    shape: Tensor  # (parts,) index into `shapes`
    offset: Tensor  # of a part's first weight
    kernel: Tensor  # (parts,) index of its kind into `kernels`
    slot: Tensor
    target_hops: Tensor
    source_hops: Tensor
    first_target: Tensor  # (parts,) index into `places`
    first_source: Tensor
    places: Tensor  # neurons of the parts
    kernels: Tensor  # (kernels, features) place of every number of the window within an edge, -1 where it has none
    widths: Tensor  # (kernels,) numbers of an edge
    shapes: tuple[tuple[int, int], ...]  # targets and sources

    def to(self, device: str | torch.device) -> _Layouts:
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self) if field.name != "shapes"}
        return replace(self, **moved)


class Collection:
    """Networks of many shapes, kept as their parameters alone.

    Args:
        graphs: of one wiring each, with one batch axis of networks. Networks are numbered in this order.
        frame: None for the smallest one.

    Raises:
        ValueError: there are no graphs, one has no batch axis, or a wiring does not fit into the frame.
    """

    def __init__(self, graphs: Sequence[NeuralGraph], frame: Frame | None = None) -> None:
        if not graphs:
            raise ValueError("a collection needs at least one graph")
        wirings = {wiring: i for i, wiring in enumerate(dict.fromkeys(graph.wiring for graph in graphs))}
        self.frame = Frame.of(wirings) if frame is None else frame
        for wiring in wirings:
            self.frame.check(wiring)
        for graph in graphs:
            if graph.edges[0].dim() != 4:
                raise ValueError("graphs in a collection have one batch axis, of their networks")
        self._layouts = _layouts(tuple(wirings), self.frame)
        counts = torch.tensor([graph.num_networks for graph in graphs])
        of_graph = torch.tensor([wirings[graph.wiring] for graph in graphs])
        self.wirings = tuple(wirings)
        self._wiring = of_graph.repeat_interleave(counts)  # of every network
        weights = [torch.cat([edges.flatten(1) for edges in graph.edges], dim=1) for graph in graphs]
        biases = [torch.cat([nodes.flatten(1) for nodes in graph.nodes], dim=1) for graph in graphs]
        self._first_weight, self._first_bias = _starts(weights), _starts(biases)
        zero = weights[0].new_zeros(1)  # what lies outside a kernel points to it
        self._weights = torch.cat([*(values.flatten() for values in weights), zero])
        self._biases = torch.cat([values.flatten() for values in biases])

    def __len__(self) -> int:
        return len(self._wiring)

    @property
    def sizes(self) -> Int[Tensor, " networks"]:
        """Number of neurons of every network."""
        return self._layouts.num_nodes[self._wiring]

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Collection:
        """The same networks elsewhere."""
        moved = object.__new__(Collection)
        moved.frame, moved.wirings, moved._layouts = self.frame, self.wirings, self._layouts.to(device)
        for name in ("_wiring", "_first_weight", "_first_bias"):
            setattr(moved, name, getattr(self, name).to(device))
        for name in ("_weights", "_biases"):
            setattr(moved, name, getattr(self, name).to(device, dtype))
        return moved

    def __getitem__(self, rows: Int[Tensor, " networks"]) -> GraphBatch:
        """The graphs of these networks, which may repeat.

        Raises:
            ValueError: rows are none, or no integers in one tensor.
        """
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.long or len(rows) == 0:
            raise ValueError("index a collection with a tensor of the networks' numbers, e.g. torch.tensor([0, 3])")
        own, wiring = self._layouts, self._wiring[rows]
        sizes = own.num_nodes[wiring]
        first = sizes.cumsum(0) - sizes  # of every network, its first node in the batch
        node = _ranges(own.first_node[wiring], sizes)
        part = _ranges(own.first_part[wiring], own.num_parts[wiring])
        of_part = torch.arange(len(rows), device=rows.device).repeat_interleave(own.num_parts[wiring])
        order = own.shape[part].argsort(stable=True)
        part, of_part = part[order], of_part[order]
        counts = own.shape[part].bincount(minlength=len(own.shapes)).tolist()
        edge_part = _edge_parts(counts, own.shapes, rows.device)
        within = torch.cat(  # which of its part's edges an edge is
            [
                torch.arange(t * s, device=rows.device).repeat(count)
                for count, (t, s) in zip(counts, own.shapes, strict=True)
            ]
        )
        kernel = own.kernel[part]
        start = self._first_weight[rows][of_part] + own.offset[part]
        place = own.kernels[kernel][edge_part]
        present = place >= 0
        index = (start[edge_part] + within * own.widths[kernel][edge_part]).unsqueeze(1) + place
        return GraphBatch(
            frame=self.frame,
            biases=self._biases[_ranges(self._first_bias[rows], sizes)],
            node_slot=own.node_slot[node],
            position=own.position[node],
            activation=own.activation[node],
            network=torch.arange(len(rows), device=rows.device).repeat_interleave(sizes),
            weights=self._weights[torch.where(present, index, len(self._weights) - 1)],
            present=present,
            edge_slot=own.slot[part][edge_part],
            stacks=_stacks(own, counts, part, first[of_part]),
            outputs=own.output[wiring] + first.unsqueeze(1),
            sizes=sizes,
        )


def _stacks(own: _Layouts, counts: list[int], part: Tensor, first: Tensor) -> tuple[Stack, ...]:
    """The stacks of a batch, whose parts are sorted by shape; `first` is the first node of every part's network."""
    stacks, a, edge = [], 0, 0
    for count, (t, s) in zip(counts, own.shapes, strict=True):
        if count:
            rows, nodes = part[a : a + count], first[a : a + count].unsqueeze(1)
            targets, sources = (
                own.places[start[rows].unsqueeze(1) + torch.arange(size, device=part.device)] + nodes
                for start, size in ((own.first_target, t), (own.first_source, s))
            )
            hops = own.target_hops[rows], own.source_hops[rows]
            stacks.append(Stack(targets, sources, *hops, slice(edge, edge + count * t * s)))
        a, edge = a + count, edge + count * t * s
    return tuple(stacks)


def _edge_parts(counts: list[int], shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """The part of every edge, parts sorted by shape."""
    edges = torch.tensor([t * s for t, s in shapes], device=device)
    parts = edges.repeat_interleave(torch.tensor(counts, device=device))
    return torch.arange(len(parts), device=device).repeat_interleave(parts)


def _starts(rows: Sequence[Tensor]) -> Tensor:
    """Where every network's numbers begin when matrices (networks, numbers) are flattened one after the other."""
    starts, total = [], 0
    for values in rows:
        count, width = values.shape
        starts.append(total + torch.arange(count) * width)
        total += count * width
    return torch.cat(starts)


def _ranges(first: Tensor, count: Tensor) -> Tensor:
    """The numbers from `first[i]` on, `count[i]` of them, for every i."""
    skip = count.cumsum(0) - count
    return torch.arange(int(count.sum()), device=count.device) + (first - skip).repeat_interleave(count)


def _layouts(wirings: Sequence[Wiring], frame: Frame) -> _Layouts:
    """Read once what every wiring's graphs look like."""
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    shapes: dict[tuple[int, int], int] = {}
    kernels: dict[Kind, int] = {}
    for wiring in wirings:
        columns["first_node"].append(len(columns["position"]))
        columns["first_part"].append(len(columns["shape"]))
        columns["num_nodes"].append(wiring.num_nodes)
        _add_nodes(columns, wiring, frame)
        offset, hops = 0, _hops_to_outputs(wiring)
        for block in wiring.blocks:
            offset += _add_parts(columns, wiring, block, frame, offset, hops, shapes, kernels)
        columns["num_parts"].append(len(columns["shape"]) - columns["first_part"][-1])
    return _Layouts(
        **{name: torch.tensor(values) for name, values in columns.items()},
        kernels=torch.stack([_window(kind, frame) for kind in kernels]),
        widths=torch.tensor([math.prod(kernel) for kernel, _ in kernels]),
        shapes=tuple(shapes),
    )


def _add_nodes(columns: dict[str, list[Any]], wiring: Wiring, frame: Frame) -> None:
    outputs = wiring.with_role("output")
    columns["output"].append([wiring.offsets[g] + i for g in outputs for i in range(wiring.groups[g].size)])
    for group in wiring.groups:
        slot = frame.slot(group) if group.bias is not None else 0
        columns["node_slot"] += [slot] * group.size
        columns["position"] += frame.position(group)
        columns["activation"] += [frame.activation(group)] * group.size


def _add_parts(
    columns: dict[str, list[Any]],
    wiring: Wiring,
    block: Block,
    frame: Frame,
    offset: int,
    hops: list[int],
    shapes: dict[tuple[int, int], int],
    kernels: dict[Kind, int],
) -> int:
    """Add a block's parts, whose numbers begin at `offset`; how many numbers it has.

    Raises:
        ValueError: an edge has several numbers that are no kernel.
    """
    t, s = (
        (wiring.groups[group].size if nodes is None else len(nodes)) // block.groups
        for group, nodes in ((block.target, block.target_nodes), (block.source, block.source_nodes))
    )
    width = math.prod(block.view.size[3:]) if block.view is not None else 1
    if width != math.prod(block.kernel):
        raise ValueError(f"parameter {block.weight} has {width} numbers an edge, but its kernel is {block.kernel}")
    source, target = (ends.view(block.groups, t, s) for ends in wiring.edge_index(block))
    for part in range(block.groups):
        columns["shape"].append(shapes.setdefault((t, s), len(shapes)))
        columns["offset"].append(offset + part * t * s * width)
        kind = block.kernel, block.weight is not None
        columns["kernel"].append(kernels.setdefault(kind, len(kernels)))
        columns["slot"].append(frame.slot(wiring.groups[block.target]) if block.weight is not None else 0)
        columns["target_hops"].append(hops[block.target])
        columns["source_hops"].append(hops[block.source])
        columns["first_source"].append(len(columns["places"]))
        columns["places"] += source[part, 0].tolist()
        columns["first_target"].append(len(columns["places"]))
        columns["places"] += target[part, :, 0].tolist()
    return block.groups * t * s * width


def _hops_to_outputs(wiring: Wiring) -> list[int]:
    """For every group the number of blocks on the shortest way to an output group, in any direction."""
    groups = range(len(wiring.groups))
    outputs = wiring.with_role("output")
    hops = [0 if g in outputs else len(groups) for g in groups]
    for _ in groups:
        for block in wiring.blocks:
            near = min(hops[block.source], hops[block.target]) + 1
            hops[block.source], hops[block.target] = min(hops[block.source], near), min(hops[block.target], near)
    return hops


def _window(kind: Kind, frame: Frame) -> Tensor:
    """For every place of the flattened window, which of an edge's numbers lies there, -1 for none."""
    kernel, is_weight = kind
    inside = torch.full((frame.features,), -1)
    first = is_weight and not kernel and frame.linear == "linear"
    places = torch.zeros(1, dtype=torch.long) if first else kernel_places(kernel, frame.window)
    inside[places] = torch.arange(math.prod(kernel))
    return inside
