"""Messages along the blocks of a batch: from where to where, in which directions, and how many each node gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ngcore.graph.batch import Ends, GraphBatch

# In which directions messages run (paper, section 2.4), and in which of their edges' features the weight e stands:
# along the network's own direction, and against it.
DIRECTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "both": ((0, 2), (1, 2)),  # [e, 0, e] and [0, e, e], i.e. E, Eᵀ and E + Eᵀ
    "without_sum": ((0,), (1,)),  # [e, 0] and [0, e]
    "sum": ((0,), (0,)),  # e either way, i.e. E + Eᵀ alone: undirected
    "forward": ((0,), ()),
    "reversed": ((), (0,)),
}


@dataclass(frozen=True)
class Messages:
    """What neurons `of` a stack's blocks send `to` others, in one direction.

    Attributes:
        near: how many blocks go to neurons that are at most 0, 1, 2, ... blocks from an output; they come first.
        reverse: against the network's own direction.
        order: of the stack's blocks; None for their own.
    """

    to: Ends
    of: Ends
    near: tuple[int, ...]
    reverse: bool
    stack: int
    order: Int[Tensor, " blocks"] | None = None

    def within(self, hops: int) -> int:
        """How many blocks are at most so far from an output."""
        return self.near[min(hops, len(self.near) - 1)]

    def first(self, blocks: int) -> Messages:
        """Of the first blocks alone."""
        if blocks == self.near[-1]:
            return self
        near = tuple(min(count, blocks) for count in self.near)
        return replace(self, to=self.to.select(slice(blocks)), of=self.of.select(slice(blocks)), near=near)


def messages_of(batch: GraphBatch, directions: str = "both") -> tuple[Messages, ...]:
    """The messages of a batch's stacks, those along the network's direction first.

    Raises:
        ValueError: `directions` is no key of `DIRECTIONS`.
    """
    along, against = copies_of(directions)
    stacks = list(enumerate(batch.stacks))
    found = [Messages(s.targets, s.sources, s.near_targets, False, i) for i, s in stacks if along]
    for i, stack in stacks if against else ():
        to, of, order = stack.sources, stack.targets, stack.by_sources
        if order is not None:
            to, of = to.select(order), of.select(order)
        found.append(Messages(to, of, stack.near_sources, True, i, order))
    return tuple(found)


def copies_of(directions: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A value of `DIRECTIONS`; a ValueError if there is none."""
    if directions not in DIRECTIONS:
        raise ValueError(f"directions is one of {', '.join(DIRECTIONS)}, not {directions!r}")
    return DIRECTIONS[directions]


@dataclass(frozen=True)
class Neighbours:
    """How many messages every node of a batch gets, per node tensor: the number to divide by, and PNA's amplification
    log(degree + 1) / δ; one number of each where it is the same for all nodes of a tensor."""

    degrees: tuple[Float[Tensor, "_ 1"], ...]
    scalers: tuple[Float[Tensor, "_ 1"], ...]

    @classmethod
    def of(cls, batch: GraphBatch, directions: str, mean_log_degree: Tensor) -> Neighbours:
        count = degrees(batch, directions).to(mean_log_degree.dtype).view(-1, 1)
        scaler = torch.log(count + 1) / mean_log_degree
        both = (x.split(batch.tensors) for x in (count.clamp(min=1), scaler))
        return cls(*(tuple(x[:1] if a else x for x, a in zip(own, batch.alike, strict=True)) for own in both))


def degrees(batch: GraphBatch, directions: str) -> Float[Tensor, " nodes"]:
    """Number of messages that every node gets."""
    along, against = copies_of(directions)
    return bool(along) * batch.nodes.incoming + bool(against) * batch.nodes.outgoing


def first_blocks(
    messages: tuple[Messages, ...], edges: tuple[Tensor, ...], counts: Sequence[int]
) -> tuple[tuple[Messages, ...], tuple[Tensor, ...]]:
    """Of every stack's messages and edges those of the first blocks, nothing where there are none."""
    kept = [(own, edge, count) for own, edge, count in zip(messages, edges, counts, strict=True) if count]
    return (
        tuple(own.first(count) for own, _, count in kept),
        tuple(edge if count == own.near[-1] else edge[:count] for own, edge, count in kept),
    )
