"""All pairs of the nodes of networks, as a transformer reads them: where nodes stand, and which pairs are edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ngcore.graph.batch import GraphBatch
from ngcore.graph.wiring import Wiring

Pairs = tuple[slice, slice]  # rows (targets) and columns (sources) of the pairs of nodes
EVERY = slice(None)


@dataclass(frozen=True)
class Places:
    """Where the nodes of networks stand among all pairs: each network filled up to the largest.

    Copies of one network keep the order of its wiring (`in_order`). Where networks differ, output neurons come first:
    one slice is theirs in all.

    Shapes:
        network, place: (nodes of a copy,) which of a copy's `networks` a node belongs to, and where it stands in it
        present: (networks, size) which places hold a node, None for all
        outputs: the places of the output neurons
    """

    network: Int[Tensor, " nodes"]
    place: Int[Tensor, " nodes"]
    networks: int
    size: int
    outputs: slice
    present: Bool[Tensor, "networks size"] | None = None
    in_order: bool = False

    @classmethod
    def of(cls, batch: GraphBatch) -> Places:
        run = _run_of(_outputs_of(batch.graphs[0][1].wiring)) if batch.is_static else None
        if run is not None:
            count = len(batch.network)
            place = torch.arange(count, device=batch.network.device)
            return cls(batch.network, place, 1, count, slice(*run), in_order=True)
        is_output = torch.zeros_like(batch.network, dtype=torch.bool)
        is_output[batch.outputs[batch.outputs >= 0]] = True
        order = (2 * batch.network + ~is_output).argsort(stable=True)
        first = batch.sizes.cumsum(0) - batch.sizes
        place = torch.empty_like(batch.network)
        place[order] = torch.arange(len(order), device=order.device) - first[batch.network]
        size = int(batch.sizes.max())
        present = (torch.arange(size, device=place.device) < batch.sizes.unsqueeze(1)).repeat(batch.copies, 1)
        return cls(batch.network, place, len(batch.sizes), size, slice(batch.outputs.shape[1]), present)

    def spread(self, nodes: Float[Tensor, "copies nodes width"]) -> Float[Tensor, "networks size width"]:
        """States of nodes at their places, zeros where there is none."""
        if self.in_order:
            return nodes
        copies, _, width = nodes.shape
        states = nodes.new_zeros(copies, self.networks * self.size, width)
        return states.index_copy(1, self.network * self.size + self.place, nodes).view(-1, self.size, width)

    def collect(self, states: Float[Tensor, "networks size width"], copies: int) -> Float[Tensor, "copies nodes width"]:
        """The inverse of `spread`."""
        if self.in_order:
            return states
        return states.reshape(copies, -1, states.shape[-1])[:, self.network * self.size + self.place]


def _outputs_of(wiring: Wiring) -> list[int]:
    """Places of the output neurons, known without a look at a tensor, for which a GPU would be waited for."""
    return [wiring.offsets[g] + i for g in wiring.with_role("output") for i in range(wiring.groups[g].size)]


def _run_of(places: Sequence[int]) -> tuple[int, int] | None:
    """First and last + 1 of consecutive places, None for others."""
    first, count = places[0], len(places)
    return (first, first + count) if list(places) == list(range(first, first + count)) else None


def pairs_of(batch: GraphBatch) -> tuple[Pairs, ...] | None:
    """The pairs that every block of a wiring connects, as slices; None where blocks are not of whole layers, or two of
    them have pairs in common."""
    stacks = batch.stacks
    if not batch.is_static or any(end.nodes is not None for stack in stacks for end in (stack.targets, stack.sources)):
        return None
    ends = [(stack.targets.tensor, stack.sources.tensor) for stack in stacks]
    if len(set(ends)) < len(ends):
        return None
    nodes = [slice(end - size, end) for end, size in zip(accumulate(batch.tensors), batch.tensors, strict=True)]
    return tuple((nodes[target], nodes[source]) for target, source in ends)


def pair_states(
    batch: GraphBatch,
    places: Places,
    pairs: tuple[Pairs, ...] | None,
    common: Float[Tensor, " edge"],
    own: Sequence[Float[Tensor, "_ _ _ edge"]],
) -> Float[Tensor, "networks size size edge"]:
    """States of all pairs (target, source): `common`, and where there are edges their own added to it."""
    states = common.expand(batch.num_networks, places.size, places.size, len(common))
    if pairs is not None:
        states = states.clone()
        for (rows, columns), values in zip(pairs, own, strict=True):
            states[:, rows, columns] += values
        return states
    values = torch.cat([x.reshape(batch.copies, -1, len(common)) for x in own], dim=1)
    return states.index_put(pair_index(batch, places), values, accumulate=True)


def pair_index(batch: GraphBatch, places: Places) -> tuple[Int[Tensor, "copies edges"], ...]:
    """Network, target and source of every edge, stack after stack, in a tensor (networks, size, size)."""
    first = [0, *accumulate(batch.tensors)]
    ends: list[tuple[Tensor, Tensor]] = []
    for stack in batch.stacks:
        rows, columns = (
            torch.arange(first[end.tensor], first[end.tensor + 1], device=places.place.device).unsqueeze(0)
            if end.nodes is None
            else first[end.tensor] + end.nodes
            for end in (stack.targets, stack.sources)
        )
        ends.append(torch.broadcast_tensors(rows.unsqueeze(2), columns.unsqueeze(1)))
    rows, columns = (torch.cat([x.flatten() for x in some]) for some in zip(*ends, strict=True))
    of_copy = len(batch.sizes) * torch.arange(batch.copies, device=rows.device).unsqueeze(1)
    network = places.network[rows] + of_copy
    return network, places.place[rows].expand_as(network), places.place[columns].expand_as(network)


def of_stacks(
    states: Float[Tensor, "networks size size edge"], batch: GraphBatch, places: Places
) -> tuple[Float[Tensor, "_ _ _ edge"], ...]:
    """The states of edges among those of all pairs, stack by stack."""
    shapes = [stack.weights.shape[1:4] for stack in batch.stacks]
    found = states[pair_index(batch, places)].split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(x.reshape(-1, *shape[1:], x.shape[-1]) for x, shape in zip(found, shapes, strict=True))
