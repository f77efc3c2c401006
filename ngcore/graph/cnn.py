"""Wiring of convolutional networks with skip connections, written down without tracing a module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ngcore.graph.spaces import Space, cut, unify
from ngcore.graph.symmetry import Symmetry
from ngcore.graph.wiring import Block, Group, View, Wiring


def cnn(
    channels: Sequence[int],
    kernel_size: Sequence[int],
    activation: Sequence[str],
    residual: Sequence[int],
    classes: int,
) -> Wiring:
    """Wiring of convolutions, global average pooling and a linear layer; equal to what `trace` finds, without its time.

    Parameters are `layers.<i>.weight`, `layers.<i>.bias`, `fc.weight` and `fc.bias`.

    Args:
        channels: of the images and of every convolution's output.
        kernel_size, activation: of every convolution; kernels are square.
        residual: for every convolution -1, or the earlier one whose output is added before its activation, on the
            first channels, as many as both have.

    Raises:
        ValueError: the lengths disagree, or a convolution would add one that is not before the last.
    """
    layers = len(channels) - 1
    if layers < 1 or {len(kernel_size), len(activation), len(residual)} != {layers}:
        raise ValueError(
            f"{len(channels)} numbers of channels need {layers} kernel sizes, activations and residuals, got "
            f"{len(kernel_size)}, {len(activation)} and {len(residual)}"
        )
    groups = [Group(channels[0], "input", 0)]
    blocks: list[Block] = []
    spaces = [Space(channels[0], pinned=True)]
    axes: dict[str, tuple[Space, ...]] = {}
    for i, (sources, targets) in enumerate(pairwise(channels)):
        k, earlier = kernel_size[i], residual[i]
        if not (earlier == -1 or 0 <= earlier <= i - 2):
            raise ValueError(f"convolution {i} can add -1 (nothing) or a convolution from 0 to {i - 2}, not {earlier}")
        groups.append(Group(targets, "hidden", i + 1, activation[i], f"layers.{i}.bias"))
        size = (1, targets, sources, k * k)
        view = View(size, (targets * sources * k * k, sources * k * k, k * k, 1), 0)
        blocks.append(Block(i, i + 1, f"layers.{i}.weight", "convolution", view, kernel=(k, k)))
        spaces.append(Space(targets))
        if earlier >= 0:
            shared = min(channels[earlier + 1], targets)
            nodes = range(shared)
            blocks.append(
                Block(earlier + 1, i + 1, None, "residual", groups=shared, source_nodes=nodes, target_nodes=nodes)
            )
            unify(_first(spaces[earlier + 1], shared), _first(spaces[i + 1], shared))
        kernel = (Space(k, pinned=True), Space(k, pinned=True))
        axes[f"layers.{i}.weight"] = (spaces[i + 1], spaces[i], *kernel)
        axes[f"layers.{i}.bias"] = (spaces[i + 1],)
    groups.append(Group(classes, "output", layers + 1, "identity", "fc.bias"))
    blocks.append(Block(layers, layers + 1, "fc.weight"))
    spaces.append(Space(classes, pinned=True))
    axes["fc.weight"], axes["fc.bias"] = (spaces[-1], spaces[-2]), (spaces[-1],)
    parameters = tuple((name, tuple(space.size for space in own)) for name, own in axes.items())
    return Wiring(tuple(groups), tuple(blocks), parameters, symmetry=Symmetry(axes))


def _first(space: Space, count: int) -> Space:
    """The first neurons of a layer, which may be all of them."""
    return cut(space, [count, space.size - count])[0] if count < space.size else space
