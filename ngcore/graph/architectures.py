"""Wirings of MLPs and of convolutional networks with skip connections, written down without tracing a module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import get_args

from ngcore.graph.pyg import Flatten
from ngcore.graph.structure import Block, Group, Role, View
from ngcore.graph.symmetry.group import Symmetry
from ngcore.graph.symmetry.spaces import Space, cut, product_of, unify
from ngcore.graph.wiring import Wiring


def mlp(sizes: Sequence[int], activation: str = "relu") -> Wiring:
    """Wiring of a multi-layer perceptron with parameters `layers.<i>.weight` and `layers.<i>.bias`, as `trace` has it.

    `sizes` counts the neurons from input to output; the activation follows every layer but the last.
    """
    if len(sizes) < 2:
        raise ValueError(f"an MLP needs at least an input and an output layer, got sizes {list(sizes)}")
    last = len(sizes) - 1
    groups = [Group(sizes[0], "input", 0, where="layers.0")]
    for i, size in enumerate(sizes[1:], start=1):
        role: Role = "output" if i == last else "hidden"
        module = f"layers.{i - 1}"
        groups.append(Group(size, role, i, "identity" if i == last else activation, f"{module}.bias", where=module))
    blocks = tuple(Block(i, i + 1, f"layers.{i}.weight") for i in range(last))
    spaces = [Space(size, pinned=i in (0, last)) for i, size in enumerate(sizes)]
    axes: dict[str, tuple[Space, ...]] = {}
    for i in range(last):
        axes[f"layers.{i}.weight"] = (spaces[i + 1], spaces[i])
        axes[f"layers.{i}.bias"] = (spaces[i + 1],)
    parameters = tuple((name, tuple(space.size for space in own)) for name, own in axes.items())
    return Wiring(tuple(groups), blocks, parameters, symmetry=Symmetry(axes))


def cnn(
    channels: Sequence[int],
    kernel_size: Sequence[int],
    activation: Sequence[str],
    residual: Sequence[int],
    classes: int,
    pool: int = 1,
    flatten: Flatten = "layer",
) -> Wiring:
    """Wiring of convolutions, average pooling and a linear layer, equal to what `trace` finds, without its time.

    Parameters are `layers.<i>.weight`, `layers.<i>.bias`, `fc.weight` and `fc.bias`.

    Args:
        channels: of the images and of every convolution's output.
        kernel_size, activation: of every convolution; kernels are square.
        residual: for every convolution -1, or the earlier one whose output is added before its activation, on the
            first channels, as many as both have.
        pool: what is left of images before they are flattened is pool x pool.
        flatten: how that is shown where pool is not 1 (paper, appendix C.2): by a layer of neurons for the channels at
            every location ("layer"), or by repeating the last convolution's neurons, with all edges that point to them,
            for every location ("repeat").

    Raises:
        ValueError: the lengths disagree, a convolution would add one that is not before the last, `pool` is below 1 or
            `flatten` unknown.
    """
    _check(channels, kernel_size, activation, residual)
    if pool < 1 or flatten not in get_args(Flatten):
        raise ValueError(f"pool is at least 1 and flatten one of {get_args(Flatten)}, got {pool} and {flatten!r}")
    groups, blocks = _convolutions(channels, kernel_size, activation, residual)
    if pool > 1:
        groups, blocks = _flattened(groups, blocks, pool**2, flatten)
    heads = [g for g, group in enumerate(groups) if group.locations is not None] or [len(groups) - 1]
    groups.append(Group(classes, "output", 1 + groups[heads[0]].layer, "identity", "fc.bias", where="fc"))
    if len(heads) == 1:
        blocks.append(Block(heads[0], len(groups) - 1, "fc.weight"))
    else:  # channels are the slower axis of the flattened ones
        count = len(heads)
        views = [View((1, classes, channels[-1]), (0, channels[-1] * count, count), r) for r in range(count)]
        blocks += [Block(g, len(groups) - 1, "fc.weight", view=v) for g, v in zip(heads, views, strict=True)]
    axes = _axes(channels, kernel_size, residual, classes, pool)
    parameters = tuple((name, tuple(space.size for space in own)) for name, own in axes.items())
    return Wiring(tuple(groups), tuple(blocks), parameters, symmetry=Symmetry(axes))


def _check(
    channels: Sequence[int], kernel_size: Sequence[int], activation: Sequence[str], residual: Sequence[int]
) -> None:
    layers = len(channels) - 1
    if layers < 1 or {len(kernel_size), len(activation), len(residual)} != {layers}:
        raise ValueError(
            f"{len(channels)} numbers of channels need {layers} kernel sizes, activations and residuals, got "
            f"{len(kernel_size)}, {len(activation)} and {len(residual)}"
        )
    for i, earlier in enumerate(residual):
        if not (earlier == -1 or 0 <= earlier <= i - 2):
            raise ValueError(f"convolution {i} can add -1 (nothing) or a convolution from 0 to {i - 2}, not {earlier}")


def _convolutions(
    channels: Sequence[int], kernel_size: Sequence[int], activation: Sequence[str], residual: Sequence[int]
) -> tuple[list[Group], list[Block]]:
    """The neurons and edges before the linear layer."""
    groups = [Group(channels[0], "input", 0, where="layers.0")]
    blocks: list[Block] = []
    for i, (sources, targets) in enumerate(pairwise(channels)):
        k, earlier = kernel_size[i], residual[i]
        groups.append(Group(targets, "hidden", i + 1, activation[i], f"layers.{i}.bias", where=f"layers.{i}"))
        size = (1, targets, sources, k * k)
        view = View(size, (targets * sources * k * k, sources * k * k, k * k, 1), 0)
        blocks.append(Block(i, i + 1, f"layers.{i}.weight", "convolution", view, kernel=(k, k)))
        if earlier >= 0:
            shared = min(channels[earlier + 1], targets)
            nodes = [None if shared == count else range(shared) for count in (channels[earlier + 1], targets)]
            blocks.append(Block(earlier + 1, i + 1, None, "residual", None, shared, (), *nodes))
    return groups, blocks


def _axes(
    channels: Sequence[int], kernel_size: Sequence[int], residual: Sequence[int], classes: int, pool: int
) -> dict[str, tuple[Space, ...]]:
    """The space of every axis of every parameter; residual connections make the shared channels one."""
    spaces = [Space(channels[0], pinned=True), *(Space(count) for count in channels[1:])]
    axes: dict[str, tuple[Space, ...]] = {}
    for i, (k, earlier) in enumerate(zip(kernel_size, residual, strict=True)):
        if earlier >= 0:
            shared = min(channels[earlier + 1], channels[i + 1])
            unify(_first(spaces[earlier + 1], shared), _first(spaces[i + 1], shared))
        kernel = (Space(k, pinned=True), Space(k, pinned=True))
        axes[f"layers.{i}.weight"] = (spaces[i + 1], spaces[i], *kernel)
        axes[f"layers.{i}.bias"] = (spaces[i + 1],)
    output = Space(classes, pinned=True)
    axes["fc.weight"] = (output, product_of([spaces[-1], Space(pool**2, pinned=True)]))
    axes["fc.bias"] = (output,)
    return axes


def _flattened(
    groups: list[Group], blocks: list[Block], locations: int, flatten: Flatten
) -> tuple[list[Group], list[Block]]:
    """The graph before the linear layer, with neurons for the last convolution's channels at every location."""
    *others, last = groups
    final, channels = len(others), last.size
    if flatten == "layer":
        places = tuple(range(locations)) * channels
        virtual = Group(channels * locations, "hidden", last.layer + 1, where="fc", locations=places)
        sources = tuple(channel for channel in range(channels) for _ in range(locations))
        into = Block(final, final + 1, None, "flatten", groups=virtual.size, source_nodes=sources)
        return [*groups, virtual], [*blocks, into]
    copies = [replace(last, tied=r > 0, locations=(r,) * channels) for r in range(locations)]
    into = [block for block in blocks if block.target == final]
    repeated = [replace(block, target=final + r, tied=r > 0) for r in range(locations) for block in into]
    return [*others, *copies], [*(block for block in blocks if block.target != final), *repeated]


def _first(space: Space, count: int) -> Space:
    """The first neurons of a layer, which may be all of them."""
    return cut(space, [count, space.size - count])[0] if count < space.size else space
