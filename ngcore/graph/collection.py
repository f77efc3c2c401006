"""Networks of many architectures, kept as their parameters alone, and batches of any of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ngcore.graph.batch import (
    FAR,
    Ends,
    GraphBatch,
    KernelKind,
    Nodes,
    Stack,
    add_nodes,
    block_numbers,
    block_shape,
    check_kernel,
    edge_slot,
    hops_to_outputs,
    window_of,
)
from ngcore.graph.frame import Frame
from ngcore.graph.structure import Block
from ngcore.graph.wiring import NeuralGraph, Wiring

Shape = tuple[int, int]  # of a part: targets and sources


class Collection:
    """Networks of many architectures, kept as their parameters alone.

    Args:
        graphs: each with a single wiring and one batch axis of networks. Networks are numbered in this order.
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
        self.layouts = _layouts(tuple(wirings), self.frame)
        counts = torch.tensor([graph.num_networks for graph in graphs])
        of_graph = torch.tensor([wirings[graph.wiring] for graph in graphs])
        self.wirings = tuple(wirings)
        self.wiring = of_graph.repeat_interleave(counts)  # of every network
        weights = [torch.cat([edges.flatten(1) for edges in graph.edges], dim=1) for graph in graphs]
        biases = [torch.cat([nodes.flatten(1) for nodes in graph.nodes], dim=1) for graph in graphs]
        self.first_weight, self.first_bias = _starts(weights), _starts(biases)
        zero = weights[0].new_zeros(1)  # what lies outside a kernel points to it
        self.weights = torch.cat([*(values.flatten() for values in weights), zero])
        self.biases = torch.cat([values.flatten() for values in biases])

    def __len__(self) -> int:
        return len(self.wiring)

    def __repr__(self) -> str:
        return f"Collection({len(self)} networks of {len(self.wirings)} architectures, {self.frame})"

    @property
    def sizes(self) -> Int[Tensor, " networks"]:
        """Number of nodes of every network."""
        return self.layouts.num_nodes[self.wiring]

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Collection:
        """The same networks elsewhere."""
        moved = object.__new__(Collection)
        moved.frame, moved.wirings, moved.layouts = self.frame, self.wirings, self.layouts.to(device)
        for name in ("wiring", "first_weight", "first_bias"):
            setattr(moved, name, getattr(self, name).to(device))
        for name in ("weights", "biases"):
            setattr(moved, name, getattr(self, name).to(device, dtype))
        return moved

    def __getitem__(self, rows: Int[Tensor, " networks"]) -> GraphBatch:
        """The graphs of these networks, which may repeat.

        Raises:
            ValueError: rows are none, or no integers in one tensor.
        """
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.long or len(rows) == 0:
            raise ValueError("index a collection with a tensor of the networks' numbers, e.g. torch.tensor([0, 3])")
        own, wiring = self.layouts, self.wiring[rows]
        sizes = own.num_nodes[wiring]
        node = _ranges(own.first_node[wiring], sizes)
        first = sizes.cumsum(0) - sizes  # of every network, its first node in the batch
        part, of_part, order = self._parts(wiring)
        return GraphBatch(
            frame=self.frame,
            nodes=Nodes(**{f.name: getattr(own, f.name)[node] for f in fields(Nodes)}),
            tensors=(len(node),),
            biases=self.biases[_ranges(self.first_bias[rows], sizes)].view(1, -1, 1),
            stacks=tuple(self._stacks(part, first[of_part], self.first_weight[rows][of_part] + own.offset[part])),
            network=torch.arange(len(rows), device=rows.device).repeat_interleave(sizes),
            inputs=_shifted(own.inputs[wiring], first),
            outputs=_shifted(own.outputs[wiring], first),
            sizes=sizes,
            graphs=_LazyGraphs(self, rows),
            is_static=False,
            parts=order.argsort(),
            first_part=own.num_parts[wiring].cumsum(0) - own.num_parts[wiring],
        )

    def _parts(self, wiring: Int[Tensor, " networks"]) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of networks, those of a shape together and the nearest to the outputs first.

        Also the network of each, and their order before.
        """
        own = self.layouts
        part = _ranges(own.first_part[wiring], own.num_parts[wiring])
        of_part = torch.arange(len(wiring), device=part.device).repeat_interleave(own.num_parts[wiring])
        order = (own.shape[part] * (FAR + 1) + own.target_hops[part]).argsort(stable=True)
        return part[order], of_part[order], order

    def _stacks(self, part: Tensor, first: Tensor, start: Tensor) -> Iterator[Stack]:
        """The parts of each shape, put together by index arithmetic alone; where each network's nodes and each part's
        weights begin."""
        own, count = self.layouts, len(self.layouts.shapes) * (FAR + 1)
        keys = [own.shape[part] * (FAR + 1) + hops[part] for hops in (own.target_hops, own.source_hops)]
        numbers = torch.stack([key.bincount(minlength=count) for key in keys])
        near = numbers.view(2, -1, FAR + 1).cumsum(2).tolist()  # the one time that a batch waits for its device
        by_sources = keys[1].argsort(stable=True)
        counts = [own_near[-1] for own_near in near[0]]
        begin = [0, *accumulate(counts)]
        parts = zip(*(x.split(counts) for x in (part, first, start, by_sources)), strict=True)
        for shape, a, targets, sources, (*some, order) in zip(own.shapes, begin, *near, parts, strict=False):
            if len(order):
                several = len({0, *sources}) > 2  # else the blocks stand in that order as they are
                yield self._stack(*some, shape, tuple(targets), tuple(sources), order - a if several else None)

    def _stack(
        self,
        part: Tensor,
        first: Tensor,
        start: Tensor,
        shape: Shape,
        near_targets: tuple[int, ...],
        near_sources: tuple[int, ...],
        by_sources: Tensor | None,
    ) -> Stack:
        own, (t, s) = self.layouts, shape
        targets, sources = (
            own.places[begin[part].unsqueeze(1) + torch.arange(size, device=part.device)] + first.unsqueeze(1)
            for begin, size in ((own.first_target, t), (own.first_source, s))
        )
        place = own.kernels[own.kernel[part]]  # (parts, features)
        within = torch.arange(t * s, device=part.device) * own.widths[own.kernel[part]].unsqueeze(1)
        index = (start.unsqueeze(1) + within).unsqueeze(2) + place.unsqueeze(1)
        present = place >= 0
        weights = self.weights[torch.where(present.unsqueeze(1), index, len(self.weights) - 1)]
        return Stack(
            Ends(0, targets),
            Ends(0, sources),
            near_targets,
            near_sources,
            by_sources,
            own.edge_slot[part],
            present,
            weights.view(1, len(part), t, s, -1),
        )

    def graphs_of(self, rows: Int[Tensor, " networks"]) -> list[tuple[Int[Tensor, " some"], NeuralGraph]]:
        """These networks by wiring: their places in `rows`, and their graph."""
        wiring = self.wiring[rows]
        return [
            ((wiring == w).nonzero().squeeze(1), self._graph(w, rows[wiring == w])) for w in wiring.unique().tolist()
        ]

    def _graph(self, w: int, rows: Int[Tensor, " some"]) -> NeuralGraph:
        wiring, count = self.wirings[w], len(rows)
        index = self.first_bias[rows].unsqueeze(1) + torch.arange(wiring.num_nodes, device=rows.device)
        nodes = self.biases[index].unsqueeze(2).split([group.size for group in wiring.groups], dim=1)
        numbers = [block_numbers(wiring, block) for block in wiring.blocks]
        index = self.first_weight[rows].unsqueeze(1) + torch.arange(sum(numbers), device=rows.device)
        edges = []
        for block, values in zip(wiring.blocks, self.weights[index].split(numbers, dim=1), strict=True):
            targets, sources = block_shape(wiring, block)
            edges.append(values.view(count, block.groups * targets, sources, -1))
        return NeuralGraph(wiring, nodes, tuple(edges))


class _LazyGraphs(Sequence):
    """`Collection.graphs_of`, read when it is asked for: most models never do."""

    def __init__(self, collection: Collection, rows: Tensor) -> None:
        self.collection, self.rows = collection, rows

    @cached_property
    def found(self) -> list[tuple[Tensor, NeuralGraph]]:
        return self.collection.graphs_of(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.found[i]

    def __len__(self) -> int:
        return len(self.found)


@dataclass(frozen=True)
class _Layouts:
    """Where things lie in the graphs of all wirings, one after the other; `first_*` say where a wiring's own begin.

    A part is a block, or one of the groups of a block. Offsets count from the first number of a network.
    """

    slot: Tensor  # of nodes, as are the next four
    position: Tensor
    activation: Tensor
    incoming: Tensor
    outgoing: Tensor
    inputs: Tensor  # (wirings, inputs of the frame) places of the input neurons, -1 for none
    outputs: Tensor
    num_nodes: Tensor  # (wirings,)
    first_node: Tensor
    num_parts: Tensor
    first_part: Tensor
    shape: Tensor  # (parts,) index into `shapes`
    offset: Tensor  # of a part's first weight
    kernel: Tensor  # (parts,) index of its kind into `kernels`
    edge_slot: Tensor
    target_hops: Tensor
    source_hops: Tensor
    first_target: Tensor  # (parts,) index into `places`
    first_source: Tensor
    places: Tensor  # neurons of the parts
    kernels: Tensor  # (kernels, features) place of every number of the window within an edge, -1 where it has none
    widths: Tensor  # (kernels,) numbers of an edge
    shapes: tuple[Shape, ...]

    def to(self, device: str | torch.device) -> _Layouts:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "shapes"}
        return replace(self, **moved)


def _shifted(places: Tensor, first: Tensor) -> Tensor:
    """Places within networks as places in the batch; -1 stays."""
    return torch.where(places >= 0, places + first.unsqueeze(1), -1)


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
    shapes: dict[Shape, int] = {}
    kernels: dict[KernelKind, int] = {}
    for wiring in wirings:
        columns["first_node"].append(len(columns["position"]))
        columns["first_part"].append(len(columns["shape"]))
        columns["num_nodes"].append(wiring.num_nodes)
        add_nodes(columns, wiring, frame)
        offset, hops = 0, hops_to_outputs(wiring)
        for block in wiring.blocks:
            _add_parts(columns, wiring, block, frame, offset, hops, shapes, kernels)
            offset += block_numbers(wiring, block)
        columns["num_parts"].append(len(columns["shape"]) - columns["first_part"][-1])
    return _Layouts(
        **{name: torch.tensor(values) for name, values in columns.items()},
        kernels=torch.stack([window_of(kind, frame) for kind in kernels]),
        widths=torch.tensor([math.prod(kernel) for kernel, _ in kernels]),
        shapes=tuple(shapes),
    )


def _add_parts(
    columns: dict[str, list[Any]],
    wiring: Wiring,
    block: Block,
    frame: Frame,
    offset: int,
    hops: list[int],
    shapes: dict[Shape, int],
    kernels: dict[KernelKind, int],
) -> None:
    """Add a block's parts, whose numbers begin at `offset`."""
    check_kernel(block)
    t, s = block_shape(wiring, block)
    source, target = (ends.view(block.groups, t, s) for ends in wiring.edge_index(block))
    kind = block.kernel, block.weight is not None
    for part in range(block.groups):
        columns["shape"].append(shapes.setdefault((t, s), len(shapes)))
        columns["target_hops"].append(hops[block.target])
        columns["source_hops"].append(hops[block.source])
        columns["offset"].append(offset + part * t * s * math.prod(block.kernel))
        columns["kernel"].append(kernels.setdefault(kind, len(kernels)))
        columns["edge_slot"].append(edge_slot(wiring, block, frame))
        columns["first_source"].append(len(columns["places"]))
        columns["places"] += source[part, 0].tolist()
        columns["first_target"].append(len(columns["places"]))
        columns["places"] += target[part, :, 0].tolist()
