"""The neural graph as torch_geometric `Data`: what a graph network of any library reads (Kofinas et al., section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from ngcore.activations import NAMES as ACTIVATIONS
from ngcore.graph.structure import Block, Group, edge_index

# What the integers in `Data` stand for. New names go before "other", the last: stored models index into these.
ROLES = ("input", "hidden", "output")
EDGE_KINDS = (
    *("linear", "convolution", "normalization", "embedding", "residual", "flatten", "product"),
    *("bias", "gamma", "beta", "other"),
)

LinearForm = Literal["linear", "convolution"]
Direction = Literal["forward", "reversed", "both", "sum"]
Flatten = Literal["layer", "repeat"]


@dataclass(frozen=True)
class _Nodes:
    """One row per neuron; `position` as `to_data` documents it."""

    x: Tensor
    layer: Tensor
    role: Tensor
    activation: Tensor
    position: Tensor

    def select(self, index: Tensor) -> _Nodes:
        return _Nodes(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Edges:
    """One row per edge; `source`, `target` and `kind` of shape (edges,), `features` of (edges, width)."""

    source: Tensor
    target: Tensor
    features: Tensor
    kind: Tensor

    def select(self, index: Tensor) -> _Edges:
        return _Edges(self.source[index], self.target[index], self.features[index], self.kind[index])


def to_data(
    groups: Sequence[Group],
    blocks: Sequence[Block],
    nodes: Sequence[Tensor],
    edges: Sequence[Tensor],
    *,
    window: Sequence[int] | None = None,
    linear: LinearForm = "linear",
    direction: Direction = "forward",
    flatten: Flatten = "layer",
) -> Data:
    """One network as torch_geometric `Data`; networks of any architecture batch if all options are the same.

    Parallel edges stay separate rows. Features keep their gradients.

    Args:
        window: the kernel window, e.g. (5, 5): kernels are centred in it, padded with zeros and flattened row by row
            (appendix C.2, figure 6). A kernel of fewer axes takes the window's last ones; where the zeros can't be
            the same on both sides, the second side has one more. None for the largest kernel of this graph along
            each axis. Give it where graphs of several architectures meet, so that their features have one width.
        linear: where the weight of an edge without a kernel is: in the first feature ("linear"), or at the window's
            centre, as in a 1x1 convolution ("convolution"; section 2.2). This goes for linear layers, for
            normalization, and for edges without a parameter (residual, flatten, product), which have the value 1.
        direction: which way edges run (section 2.4), of features e from source to target:
            "forward", e from source to target;
            "reversed", e from target to source;
            "both", [e, 0, e] from source to target and [0, e, e] from target to source, i.e. E, Eᵀ and E + Eᵀ;
            "sum", e both ways, i.e. E + Eᵀ alone: an undirected graph.
            All forward edges come before all reversed ones, in the same order.
        flatten: how the feature map before a flattening is shown (appendix C.2): with a virtual layer of a node per
            channel and location ("layer"), or by repeating the channels' own nodes and the edges that point to them
            ("repeat"); a channel that something else reads as well is kept beside its repetitions.

    Attributes:
        x: (nodes, 1) biases, 0 where there are none.
        edge_index: (2, edges) source and target.
        edge_attr: (edges, features) weights; the size of the window, three times that with direction "both".
        layer: (nodes,) longest way from an input.
        role: (nodes,) index into `ROLES`.
        activation: (nodes,) index into `ACTIVATIONS`.
        position: (nodes,) for what must not be exchanged: the place of an input or output neuron in its layer, and the
            location in space of a flattened one; 0 for all others.
        edge_kind: (edges,) index into `EDGE_KINDS`.
        edge_reversed: (edges,) whether an edge runs from target to source.

    Raises:
        ValueError: the graph is of a batch of networks, holds NaN or infinity, or has a kernel that does not fit into
            the window; an option is unknown.
    """
    _check_options(linear=(linear, LinearForm), direction=(direction, Direction), flatten=(flatten, Flatten))
    if edges[0].dim() != 3:
        raise ValueError("to_data takes one network: index the batch first, as in graph[0].to_data()")
    check_finite(groups, blocks, nodes, edges)
    layers = _layers(groups, blocks) if flatten == "repeat" else [group.layer for group in groups]
    nodes, edges = _nodes(groups, nodes, layers), _edges(groups, blocks, edges, window, linear)
    if flatten == "repeat":
        nodes, edges = _repeat_flattened(nodes, edges)
    edges, is_reversed = _direct(edges, direction)
    return Data(
        x=nodes.x,
        edge_index=torch.stack([edges.source, edges.target]),
        edge_attr=edges.features,
        layer=nodes.layer,
        role=nodes.role,
        activation=nodes.activation,
        position=nodes.position,
        edge_kind=edges.kind,
        edge_reversed=is_reversed,
    )


def kernel_places(kernel: Sequence[int], window: Sequence[int]) -> Tensor:
    """Where a kernel's flattened entries lie in a flattened window, (entries,): centred, as figure 6 shows.

    Raises:
        ValueError: the kernel is larger than the window, or has more axes.
    """
    padded = (1,) * (len(window) - len(kernel)) + tuple(kernel)
    if len(kernel) > len(window) or any(n > m for n, m in zip(padded, window, strict=True)):
        raise ValueError(f"a kernel of size {tuple(kernel)} does not fit into the window {tuple(window)}")
    places = torch.arange(math.prod(window)).view(tuple(window))
    for axis, (n, m) in enumerate(zip(padded, window, strict=True)):
        places = places.narrow(axis, (m - n) // 2, n)
    return places.flatten()


def largest_kernel(blocks: Sequence[Block]) -> tuple[int, ...]:
    """The largest size of the blocks' kernels along each axis, axes aligned at the last; () without kernels."""
    kernels = [block.kernel for block in blocks if block.kernel]
    rank = max(map(len, kernels), default=0)
    padded = [(1,) * (rank - len(kernel)) + tuple(kernel) for kernel in kernels]
    return tuple(map(max, zip(*padded, strict=True)))


def check_finite(
    groups: Sequence[Group], blocks: Sequence[Block], nodes: Sequence[Tensor], edges: Sequence[Tensor]
) -> None:
    """Raise a ValueError that names the first parameter with NaN or infinite elements."""
    named = [(block.weight, values) for block, values in zip(blocks, edges, strict=True)]
    named += [(group.bias, values) for group, values in zip(groups, nodes, strict=True)]
    for name, values in named:
        if not torch.isfinite(values).all():
            raise ValueError(f"parameter {name} holds NaN or infinity")


def index_of(name: str, names: tuple[str, ...]) -> int:
    """Place of a name among names of which the last stands for all others."""
    return names.index(name) if name in names else len(names) - 1


def _check_options(**options: tuple[str, object]) -> None:
    for name, (value, allowed) in options.items():
        if value not in get_args(allowed):
            raise ValueError(f"{name} is one of {', '.join(get_args(allowed))}, not {value!r}")


def _layers(groups: Sequence[Group], blocks: Sequence[Block]) -> list[int]:
    """Layer of every group where a flattening makes none."""
    layers = [0] * len(groups)
    for g in range(len(layers)):
        into = [block for block in blocks if block.target == g and block.source < g]
        layers[g] = max((layers[block.source] + (block.kind != "flatten") for block in into), default=0)
    return layers


def _nodes(groups: Sequence[Group], biases: Sequence[Tensor], layers: list[int]) -> _Nodes:
    device = biases[0].device
    sizes = [group.size for group in groups]

    def per_node(values: list[int]) -> Tensor:
        return torch.from_numpy(np.repeat(values, sizes)).to(device)

    return _Nodes(
        x=torch.cat(tuple(biases)),
        layer=per_node(layers),
        role=per_node([ROLES.index(group.role) for group in groups]),
        activation=per_node([index_of(group.activation, ACTIVATIONS) for group in groups]),
        position=torch.cat([_positions(group) for group in groups]).to(device),
    )


def _positions(group: Group) -> Tensor:
    if group.locations is not None:
        return torch.tensor(group.locations)
    return torch.zeros(group.size, dtype=torch.long) if group.role == "hidden" else torch.arange(group.size)


def _edges(
    groups: Sequence[Group],
    blocks: Sequence[Block],
    weights: Sequence[Tensor],
    window: Sequence[int] | None,
    linear: LinearForm,
) -> _Edges:
    frame = largest_kernel(blocks) if window is None else tuple(window)
    width = math.prod(frame)
    if window is None:  # scales with a number per position have no kernel, but may be wider than all kernels
        width = max(width, *(edges.shape[-1] for edges in weights))
    index, features, kinds = [], [], []
    for block, edges in zip(blocks, weights, strict=True):
        values = edges.flatten(0, 1)
        index.append(edge_index(groups, block))
        features.append(_in_window(values, block, frame, width, linear))
        kinds.append(torch.full((len(values),), index_of(block.kind, EDGE_KINDS), device=values.device))
    source, target = torch.cat(index, dim=1).to(weights[0].device)
    return _Edges(source, target, torch.cat(features), torch.cat(kinds))


def _in_window(values: Tensor, block: Block, window: tuple[int, ...], width: int, linear: LinearForm) -> Tensor:
    """A block's features, (edges, own features), at their places in the window, (edges, width)."""
    own = values.shape[-1]
    if block.kernel:
        places = kernel_places(block.kernel, window)
    elif own == 1 and linear == "convolution":
        places = kernel_places((), window)
    else:
        places = torch.arange(own)
    if own > width:
        raise ValueError(f"parameter {block.weight} has {own} features an edge, the window {window} only {width}")
    if own == width:  # also spares a copy: all of the window, in order
        return values
    return values.new_zeros(len(values), width).index_copy(1, places.to(values.device), values)


def _repeat_flattened(nodes: _Nodes, edges: _Edges) -> tuple[_Nodes, _Edges]:
    """Turn virtual neurons into repetitions of the channels that they come from (appendix C.2, first option)."""
    flattening = edges.kind == EDGE_KINDS.index("flatten")
    channel, copy = edges.source[flattening], edges.target[flattening]
    count = len(nodes.layer)
    repeated = torch.arange(count, device=channel.device)
    repeated[copy] = channel
    nodes = replace(nodes.select(repeated), position=nodes.position)
    # Every other edge stays, and is copied once for each repetition of its target.
    edges = edges.select(~flattening)
    extra = _copies(edges, channel, copy, count)
    read = torch.zeros(count, dtype=torch.bool, device=channel.device)
    read[edges.source] = True
    flattened = torch.zeros_like(read)
    flattened[channel] = True
    kept = read | ~flattened
    edges = _concatenate(edges.select(kept[edges.target]), extra)
    place = kept.cumsum(0) - 1
    return nodes.select(kept), replace(edges, source=place[edges.source], target=place[edges.target])


def _copies(edges: _Edges, channel: Tensor, copy: Tensor, count: int) -> _Edges:
    """The edges that point to a repeated channel, once for each of its repetitions."""
    repetitions = torch.bincount(channel, minlength=count)
    first = repetitions.cumsum(0) - repetitions
    of_edge = repetitions[edges.target]
    row = torch.arange(len(of_edge), device=copy.device).repeat_interleave(of_edge)
    which = torch.arange(len(row), device=copy.device) - (of_edge.cumsum(0) - of_edge)[row]
    by_channel = copy[torch.argsort(channel, stable=True)]
    return replace(edges.select(row), target=by_channel[first[edges.target[row]] + which])


def _concatenate(first: _Edges, second: _Edges) -> _Edges:
    return _Edges(*(torch.cat([getattr(first, n), getattr(second, n)]) for n in _Edges.__dataclass_fields__))


def _direct(edges: _Edges, direction: Direction) -> tuple[_Edges, Tensor]:
    """Edges in the directions asked for, and which of them are reversed."""
    back = replace(edges, source=edges.target, target=edges.source)
    ahead = torch.zeros(len(edges.kind), dtype=torch.bool, device=edges.kind.device)
    if direction == "forward":
        return edges, ahead
    if direction == "reversed":
        return back, ~ahead
    if direction == "both":
        e, zero = edges.features, torch.zeros_like(edges.features)
        edges = replace(edges, features=torch.cat([e, zero, e], dim=1))
        back = replace(back, features=torch.cat([zero, e, e], dim=1))
    return _concatenate(edges, back), torch.cat([ahead, ~ahead])
