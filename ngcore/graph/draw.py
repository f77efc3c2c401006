"""Pictures of small neural graphs, and of what the paper shows about kernels: its figures 1, 5 and 6."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ngcore.graph.pyg import kernel_places
from ngcore.graph.structure import Block, Group
from ngcore.graph.wiring import NeuralGraph, Wiring

COLOURS = "PuOr"  # diverging, safe for colour-blind readers; white is zero
CHANNEL_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
# Edges without a weight: how they are drawn, and their name in the legend.
WEIGHTLESS = {
    "residual": ("0.25", (0, (4, 2)), 1.3, "residual connection (1)"),
    "flatten": ("0.55", "solid", 0.9, "flattening (1)"),
    "product": ("0.35", (0, (1, 1.4)), 1.2, "product of neurons"),
}
ZERO = 1e-12  # the largest colour of a graph whose parameters are all zero: it is drawn without colours
BOW = 1.1  # rows; the middle of a curve is half as far away from its chord: between two rows of neurons
SMALLEST_KERNEL, LARGEST_KERNEL = 6.0, 30.0  # points; smaller pictures show nothing
LARGEST_NEURON = 20.0  # points
MOST_KERNELS = 400  # of a block that are shown as pictures
MOST_NEURONS, MOST_EDGES = 200, 3000  # of a graph that notebooks show as a picture


def draw(graph: NeuralGraph, ax: Axes) -> ScalarMappable:
    """Draw one network: layers from left to right, neurons from top to bottom; the largest parameter is darkest.

    Kernels are small images on their edges; where there is no room for them, an edge has the colour of its kernel's
    largest entry. Residual connections are dashed curves, flattenings are thin lines, products of neurons (attention)
    are dotted; other edges that skip a layer are curves as well. Neurons without a bias have a grey outline.

    Returns:
        the colour scale, for `figure.colorbar`.

    Raises:
        ValueError: the graph is of a batch of networks.
    """
    if graph.edges[0].dim() != 3:
        raise ValueError("draw takes one network: index the batch first, as in graph[0]")
    wiring = graph.wiring
    scale = _scale(graph)
    places = _places(wiring)
    _frame(ax, places)
    unit = _points(ax)
    for block, edges in zip(wiring.blocks, graph.edges, strict=True):
        values = edges.detach().flatten(0, 1).cpu().numpy()
        _draw_block(ax, _lines(wiring, block, places), block, values, scale, unit)
    diameter = min(LARGEST_NEURON, 0.7 * unit[1])
    for g, (group, nodes) in enumerate(zip(wiring.groups, graph.nodes, strict=True)):
        bare = group.bias is None
        ax.scatter(
            *places[wiring.offsets[g] : wiring.offsets[g + 1]].T,
            s=diameter**2 * 0.8,
            c="white" if bare else scale.to_rgba(nodes.squeeze(-1).detach().cpu().numpy()),
            edgecolors="0.6" if bare else "0.2",
            linewidths=1.0,
            zorder=5,
        )
    return scale


def draw_graph(graph: NeuralGraph, title: str = "") -> Figure:
    """A figure of its own for one network: `draw`, with the layers' names, a colour bar and a legend.

    Raises:
        ValueError: the graph is of a batch of networks.
    """
    wiring = graph.wiring
    places = _places(wiring)
    columns, rows = np.ptp(places, axis=0) + 1
    kernels = any(np.prod(block.kernel) > 1 for block in wiring.blocks)
    width, height = (1.5 if kernels else 1.15) * columns, min(max((0.75 if kernels else 0.45) * rows, 2.2), 7.0)
    labels = _labels(wiring)
    below, above = 0.3 + 0.15 * max(label.count("\n") + 1 for label in labels.values()), 0.75 if title else 0.45
    # Axes of a fixed size, in inches: `draw` fits its kernels to the room that it finds.
    figure = plt.figure(figsize=(width + 1.0, height + below + above), layout="none")
    w, h = figure.get_size_inches()
    ax = figure.add_axes((0.0, below / h, width / w, height / h))
    scale = draw(graph, ax)
    for layer, label in labels.items():
        ax.text(layer, places[:, 1].min() - 0.75, label, ha="center", va="top", fontsize=8, linespacing=1.25)
    if scale.norm.vmax > ZERO:
        bar = figure.add_axes(((width + 0.1) / w, below / h, 0.15 / w, height / h))
        figure.colorbar(scale, cax=bar, label="weight (edges), bias (nodes)")
    top = {"loc": "upper center", "bbox_to_anchor": (0.5 * width / w, (below + height + 0.42) / h), "frameon": False}
    if handles := _legend(wiring):
        figure.legend(handles=handles, ncols=len(handles), fontsize=8, **top)
    figure.text(0.5 * width / w, 1 - 0.08 / h, title, ha="center", va="top", fontsize=11)
    return figure


def _graph_html(graph: NeuralGraph) -> str | None:
    """What notebooks show of one small network, a picture above its text; None, for the text alone, of others."""
    if graph.edges[0].dim() != 3 or not _is_small(graph.wiring):
        return None
    return _picture_html(draw_graph(graph), repr(graph))


def _wiring_html(wiring: Wiring) -> str | None:
    """As `_graph_html`, without colours."""
    if not _is_small(wiring):
        return None
    graph = wiring.graph({name: torch.zeros(shape) for name, shape in wiring.shapes.items()})
    return _picture_html(draw_graph(graph), repr(wiring))


NeuralGraph._repr_html_ = _graph_html  # here, since graphs know nothing of pictures
Wiring._repr_html_ = _wiring_html


def _is_small(wiring: Wiring) -> bool:
    return wiring.num_nodes <= MOST_NEURONS and wiring.num_edges <= MOST_EDGES


def _picture_html(figure: Figure, text: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    plt.close(figure)  # else a notebook shows it once more
    picture = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/png;base64,{picture}" alt="picture of the graph"><pre>{html.escape(text)}</pre>'


def _scale(graph: NeuralGraph) -> ScalarMappable:
    """Colours for all parameters; edges without one do not count."""
    shown = [edges for block, edges in zip(graph.wiring.blocks, graph.edges, strict=True) if block.weight is not None]
    limit = max(max(values.detach().abs().max().item() for values in (*shown, *graph.nodes)), ZERO)
    return ScalarMappable(TwoSlopeNorm(0.0, -limit, limit), plt.get_cmap(COLOURS))


def _places(wiring: Wiring) -> np.ndarray:
    """(nodes, 2) coordinates: a column per layer; groups of one layer stand one above another.

    Neurons are one unit apart, further in columns that are short beside a very tall one.
    """
    places = np.zeros((wiring.num_nodes, 2))
    columns: dict[int, list[int]] = {}
    for g, group in enumerate(wiring.groups):
        columns.setdefault(group.layer, []).append(g)
    heights = {layer: sum(wiring.groups[g].size + 1 for g in own) - 1 for layer, own in columns.items()}
    tallest = max(heights.values())
    for layer, own in columns.items():
        step = min(2.5, max(1.0, tallest / heights[layer])) if tallest > 8 else 1.0
        top = (heights[layer] - 1) / 2
        for g in own:
            size = wiring.groups[g].size
            rows = step * (top - np.arange(size))
            places[wiring.offsets[g] : wiring.offsets[g + 1]] = np.stack([np.full(size, float(layer)), rows], axis=1)
            top -= size + 1
    return places


def _frame(ax: Axes, places: np.ndarray) -> None:
    (left, bottom), (right, top) = places.min(0), places.max(0)
    ax.set_xlim(left - 0.35, right + 0.35)
    ax.set_ylim(bottom - 0.6, top + 0.8)
    ax.set_axis_off()
    ax.set_aspect("auto")


def _points(ax: Axes) -> np.ndarray:
    """Points along x and y of one unit of the data."""
    box = ax.get_position()
    width, height = (72 * n for n in ax.figure.get_size_inches())
    return np.array([box.width * width / np.ptp(ax.get_xlim()), box.height * height / np.ptp(ax.get_ylim())])


def _lines(wiring: Wiring, block: Block, places: np.ndarray) -> np.ndarray:
    """(edges, 33, 2) points along every edge of a block."""
    source, target = wiring.edge_index(block).numpy()
    start, end = places[source][:, None], places[target][:, None]
    t = np.linspace(0.0, 1.0, 33)[None, :, None]
    lines = (1 - t) * start + t * end
    skips = wiring.groups[block.target].layer - wiring.groups[block.source].layer > 1
    if block.kind == "residual" or skips:
        lines[..., 1:] += 2 * t * (1 - t) * BOW
    return lines


def _draw_block(
    ax: Axes, lines: np.ndarray, block: Block, values: np.ndarray, scale: ScalarMappable, unit: np.ndarray
) -> None:
    if block.weight is None:
        colour, style, width, _ = WEIGHTLESS.get(block.kind, WEIGHTLESS["product"])
        ax.add_collection(LineCollection(lines, colors=colour, linestyles=style, linewidths=width, zorder=1))
        return
    if scale.norm.vmax == ZERO:
        ax.add_collection(LineCollection(lines, colors="0.6", linewidths=0.8, zorder=2))
        return
    if values.shape[1] > 1:
        centres = _kernel_centres(lines)
        size = _kernel_size(centres * unit, lines[:, [0, -1]] * unit)
        if size >= SMALLEST_KERNEL:
            ax.add_collection(LineCollection(lines, colors="0.7", linewidths=0.9, zorder=2))
            for centre, kernel in zip(centres, values, strict=True):
                _draw_kernel(ax, centre, scale.to_rgba(_as_image(kernel, block.kernel)), size)
            return
    strongest = np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)[:, 0]
    width = 0.8 + 2.2 * np.abs(strongest) / scale.norm.vmax
    # a grey line below shows an edge whose weight is (nearly) zero: it is an edge all the same
    ax.add_collection(LineCollection(lines, colors="0.85", linewidths=width + 0.6, zorder=2))
    ax.add_collection(LineCollection(lines, colors=scale.to_rgba(strongest), linewidths=width, zorder=3))


def _kernel_centres(lines: np.ndarray) -> np.ndarray:
    """(edges, 2) where on its edge each kernel is: a column for each source of a target, so that few come close."""
    sources = len(lines) // len(np.unique(lines[:, -1], axis=0))
    along = np.array([0.55]) if sources == 1 else np.linspace(0.4, 0.74, sources)
    steps = np.round(along * (lines.shape[1] - 1)).astype(int)
    return lines[np.arange(len(lines)), np.tile(steps, len(lines) // sources)]


def _kernel_size(centres: np.ndarray, ends: np.ndarray) -> float:
    """Points for the longer side of every kernel, so that none meets another or a neuron at an end of its edge.

    Shapes:
        centres: (edges, 2) in points
        ends: (edges, 2, 2) in points
    """
    if len(centres) > MOST_KERNELS:
        return 0.0
    apart = np.abs(centres[:, None] - centres[None]).max(2)
    between = apart[~np.eye(len(centres), dtype=bool)].min(initial=np.inf)
    to_end = np.abs(centres[:, None] - ends).max(2).min()
    return min(LARGEST_KERNEL, 0.8 * between, 1.8 * (to_end - LARGEST_NEURON / 2))


def _as_image(kernel: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A flat kernel as rows and columns; the last two axes of a 3D one are side by side."""
    if len(size) < 2:
        return kernel[None]
    return kernel.reshape(size[0], -1)


def _draw_kernel(ax: Axes, place: np.ndarray, image: np.ndarray, size: float) -> None:
    """An image, its longer side `size` points long, with a thin frame."""
    picture = OffsetImage(image, zoom=size / max(image.shape[:2]), interpolation="nearest")
    frame = {"edgecolor": "0.3", "linewidth": 0.6}
    ax.add_artist(AnnotationBbox(picture, place, pad=0.08, bboxprops=frame, zorder=4))


def _labels(wiring: Wiring) -> dict[int, str]:
    """What to write below every layer."""
    labels: dict[int, list[str]] = {}
    for g, group in enumerate(wiring.groups):
        labels.setdefault(group.layer, []).append(_label(wiring, g, group))
    return {layer: "\n·\n".join(dict.fromkeys(lines)) for layer, lines in labels.items()}


def _label(wiring: Wiring, g: int, group: Group) -> str:
    if group.role == "input":
        return "input"
    into = [block for block in wiring.blocks if block.target == g]
    kind = next((block.kind for block in into if block.weight is not None), into[0].kind if into else "")
    name = group.where.split(".")[-1] if kind not in ("flatten", "residual") else ""
    lines = [name, kind, "" if group.activation == "identity" else group.activation]
    return "\n".join(line for line in lines if line)


def _legend(wiring: Wiring) -> list[Line2D]:
    kinds = dict.fromkeys(block.kind for block in wiring.blocks if block.weight is None)
    handles = []
    for kind in kinds:
        colour, style, width, name = WEIGHTLESS.get(kind, WEIGHTLESS["product"])
        handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=width, label=name))
    if any(group.bias is None for group in wiring.groups):
        ring = {"marker": "o", "markerfacecolor": "white", "markeredgecolor": "0.6", "markersize": 8}
        handles.append(Line2D([], [], linestyle="none", label="neuron without bias", **ring))
    return handles


# Figure 5 -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """A row of figure 5: banks of shape (filters, channels, height, width), maps of (channels, height, width)."""

    image: Tensor
    first: Tensor
    features: Tensor
    second: Tensor
    output: Tensor
    order: list[int]


def draw_channel_symmetry(
    first: nn.Conv2d,
    second: nn.Conv2d,
    image: Tensor,
    order: Sequence[int],
    activation: Callable[[Tensor], Tensor] = torch.relu,
) -> Figure:
    """Permutation symmetries in a CNN, in a sub-network of two layers (paper, figure 5).

    Above, the network; below, it with the filters of its first layer (and their biases) in another order, which puts
    the channels of the feature map in that order, and with the channels of its second layer's filters in that order,
    which cancels it: the outputs are the same. Every channel of the feature map keeps a colour.

    Args:
        image: (channels, height, width) input of the first layer.
        order: place i receives filter order[i] of the first layer.

    Raises:
        ValueError: the layers don't fit each other or the image, are grouped, or `order` is no permutation of at most
            six filters.
    """
    count = first.out_channels
    if sorted(order) != list(range(count)) or count > len(CHANNEL_COLOURS):
        raise ValueError(f"order must permute the {count} filters, of which six can be shown, got {list(order)}")
    if (first.groups, second.groups) != (1, 1) or second.in_channels != count or len(image) != first.in_channels:
        raise ValueError("the second layer must read the first one's channels, and that the image's, without groups")
    before, after = (_stage(first, second, image, chosen, activation) for chosen in (list(range(count)), list(order)))
    tall = max(count, second.out_channels, first.in_channels) + 0.9
    centres = _columns(before)
    left, right, bottom, top = centres[0] - 1.2, centres[-1] + 0.55, 0.25 - 1.5 * tall, tall / 2 + 0.75
    width = 8.6
    figure, ax = plt.subplots(figsize=(width, 0.92 * width * (top - bottom) / (right - left)), layout="constrained")
    ax.set_axis_off()
    limit = max(first.weight.detach().abs().max().item(), second.weight.detach().abs().max().item())
    scale = ScalarMappable(TwoSlopeNorm(0.0, -limit, limit), plt.get_cmap(COLOURS))
    for stage, y in ((before, 0.0), (after, -tall)):
        _draw_stage(ax, stage, centres, y, scale)
    titles = ("input", "filters\nof layer 1", "feature\nmap", "filters\nof layer 2", "output")
    for x, title in zip(centres, titles, strict=True):
        ax.text(x, tall / 2 + 0.1, title, ha="center", va="bottom")
    names = (
        "a network",
        f"filters of layer 1 and channels\nof layer 2 in the order {', '.join(str(i + 1) for i in order)}",
    )
    for y, name in zip((0.0, -tall), names, strict=True):
        ax.text(centres[0] - 0.85, y, name, ha="center", va="center", rotation=90, fontsize=9)
    _draw_difference(ax, before, after, centres[-1], tall)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_aspect("equal")
    figure.colorbar(scale, ax=ax, label="weight", shrink=0.6, aspect=25, pad=0.02)
    return figure


def _stage(
    first: nn.Conv2d, second: nn.Conv2d, image: Tensor, order: list[int], activation: Callable[[Tensor], Tensor]
) -> _Stage:
    """Run the two layers with permuted channels between them."""

    def run(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(x[None], weight, bias, layer.stride, layer.padding, layer.dilation)[0]

    with torch.no_grad():
        one, two = first.weight[order], second.weight[:, order]
        features = activation(run(first, image, one, None if first.bias is None else first.bias[order]))
        return _Stage(image, one, features, two, run(second, features, two, second.bias), order)


def _columns(stage: _Stage) -> list[float]:
    """Centres of the five columns of figure 5."""
    widths = [1.0, KERNEL * stage.first.shape[1], 1.0, KERNEL * stage.second.shape[1], 1.0]
    starts = np.cumsum([0.0, *widths[:-1]]) + COLUMN_GAP * np.arange(5)
    return [start + width / 2 for start, width in zip(starts.tolist(), widths, strict=True)]


KERNEL, MAP, COLUMN_GAP = 0.8, 0.92, 0.85  # sizes of a kernel's cell and a map, with a row as the unit


def _draw_stage(ax: Axes, stage: _Stage, centres: list[float], y: float, scale: ScalarMappable) -> None:
    """One row of figure 5: input, filter bank, feature map, filter bank, output."""
    colours = [CHANNEL_COLOURS[i] for i in stage.order]
    numbers = [str(i + 1) for i in stage.order]
    plain = ["0.3"]
    _draw_maps(ax, stage.image, centres[0], y, plain * len(stage.image))
    _draw_bank(ax, stage.first, centres[1], y, scale, lambda i, j: colours[i])
    _draw_maps(ax, stage.features, centres[2], y, colours, numbers)
    _draw_bank(ax, stage.second, centres[3], y, scale, lambda i, j: colours[j], numbers)
    _draw_maps(ax, stage.output, centres[4], y, plain * len(stage.output))
    half = [0.5, KERNEL * stage.first.shape[1] / 2, 0.5, KERNEL * stage.second.shape[1] / 2, 0.5]
    for k in range(4):
        start, end = centres[k] + half[k] + 0.08, centres[k + 1] - half[k + 1] - 0.08 - (0.25 if k == 1 else 0.0)
        ax.annotate(
            "", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
        )


def _draw_maps(ax: Axes, maps: Tensor, x: float, y: float, colours: Sequence[str], numbers: Sequence[str] = ()) -> None:
    """Channels one above another, on one grey scale."""
    low, high = maps.min().item(), maps.max().item()
    tops = y + len(maps) / 2 - np.arange(len(maps)) - 0.5
    for channel, middle, colour in zip(maps, tops, colours, strict=True):
        _picture(ax, channel.numpy(), x, middle, MAP, colour, cmap="gray", vmin=low, vmax=high)
    for number, middle, colour in zip(numbers, tops, colours, strict=False):
        ax.text(x - MAP / 2 - 0.1, middle, number, color=colour, ha="right", va="center", fontweight="bold")


def _draw_bank(
    ax: Axes,
    bank: Tensor,
    x: float,
    y: float,
    scale: ScalarMappable,
    colour: Callable[[int, int], str],
    numbers: Sequence[str] = (),
) -> None:
    """Filters one above another, a filter's channels side by side; `colour` of (filter, channel)."""
    filters, channels = bank.shape[:2]
    lefts = x + (np.arange(channels) - (channels - 1) / 2) * KERNEL
    tops = y + (filters - 1) / 2 - np.arange(filters)
    for i, middle in enumerate(tops):
        for j, left in enumerate(lefts):
            _picture(ax, scale.to_rgba(bank[i, j].numpy()), left, middle, 0.82 * KERNEL, colour(i, j))
    for j, number in enumerate(numbers):
        ax.text(lefts[j], tops[0] + 0.42, number, color=colour(0, j), ha="center", va="bottom", fontweight="bold")


def _picture(ax: Axes, image: np.ndarray, x: float, y: float, size: float, colour: str, **options: object) -> None:
    """An image in a frame, around (x, y), its longer side `size` long."""
    height, width = (size * n / max(image.shape[:2]) for n in image.shape[:2])
    left, bottom = x - width / 2, y - height / 2
    ax.imshow(image, extent=(left, left + width, bottom, bottom + height), interpolation="nearest", **options)
    ax.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=colour, linewidth=2.0))


def _draw_difference(ax: Axes, before: _Stage, after: _Stage, x: float, tall: float) -> None:
    """Say by how much the two outputs differ."""
    largest = (before.output - after.output).abs().max().item()
    count = len(before.output)
    ends = (x, -count / 2 - 0.02), (x, -tall + count / 2 + 0.02)
    ax.annotate("", *ends, arrowprops={"arrowstyle": "<|-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0})
    note = "equal" if largest == 0 else f"equal\n(up to {largest:.0e})"
    ax.text(x - 0.12, -tall / 2, note, ha="right", va="center", fontsize=9)


# Figure 6 -------------------------------------------------------------------------------------------------------------

PAPERS_KERNEL = ((0.1, -0.2, 0.1), (0.1, -0.3, 0.2), (0.2, -0.2, 0.3))


def draw_kernel_padding(
    kernel: Tensor | Sequence[Sequence[float]] = PAPERS_KERNEL, window: tuple[int, int] = (5, 5)
) -> Figure:
    """How a kernel becomes the feature of an edge: padded with zeros to the window, then flattened (paper, figure 6).

    The numbers are where `ngcore.graph.pyg.kernel_places` puts them, as on the graph.

    Raises:
        ValueError: the kernel does not fit into the window.
    """
    kernel = torch.as_tensor(kernel).detach()
    places = kernel_places(tuple(kernel.shape), window)
    flat, own = torch.zeros(window).flatten(), torch.zeros(window, dtype=torch.bool).flatten()
    flat[places], own[places] = kernel.flatten().to(flat), True
    (h, w), (height, width) = kernel.shape, window
    total = height * width
    limit = max(kernel.abs().max().item(), 1e-12)
    scale = ScalarMappable(TwoSlopeNorm(0.0, -limit, limit), plt.get_cmap(COLOURS))
    figure, ax = plt.subplots(figsize=(9.2, 9.2 * (height + 4.2) / (total + 1.5)), layout="constrained")
    ax.set_axis_off()
    ax.set_aspect("equal")
    gap = 3.0
    left = (total - (w + gap + width)) / 2
    middle = height / 2 + 3.0  # the strip is at 0 to 1
    own_kernel = torch.ones_like(kernel, dtype=torch.bool)
    _draw_cells(ax, kernel, own_kernel, left, middle + h / 2, scale)
    _label_sides(ax, left, middle + h / 2, h, w, "$h$", "$w$")
    start = left + w + gap
    _draw_cells(ax, flat.view(window), own.view(window), start, middle + height / 2, scale)
    _label_sides(ax, start, middle + height / 2, height, width, r"$h_{\max}$", r"$w_{\max}$", right=True)
    _draw_cells(ax, flat[None], own[None], 0.0, 1.0, scale)
    ax.text(total / 2, -0.25, r"$h_{\max} \cdot w_{\max}$", ha="center", va="top", fontsize=11)
    _arrow(ax, (left + w + 0.35, middle), (start - 0.35, middle), "pad", (0.0, 0.2))
    below = start + width / 2
    _arrow(ax, (below, middle - height / 2 - 0.2), (below, 1.2), "flatten", (0.35, 0.0))
    ax.set_xlim(-0.5, total + 0.5)
    ax.set_ylim(-1.2, middle + height / 2 + 1.1)
    return figure


def _draw_cells(ax: Axes, values: Tensor, own: Tensor, left: float, top: float, scale: ScalarMappable) -> None:
    """A table of numbers on their colours; padding is grey on white."""
    for i, j in np.ndindex(*values.shape):
        value, is_own = values[i, j].item(), bool(own[i, j])
        face = _pale(scale.to_rgba(value)) if is_own else "white"
        ax.add_patch(Rectangle((left + j, top - i - 1), 1, 1, facecolor=face, edgecolor="0.35" if is_own else "0.75",
                               linewidth=1.0, zorder=2 if is_own else 1))  # fmt: skip
        text = f"{value:g}".replace("-", "−") if is_own else "0"
        ax.text(left + j + 0.5, top - i - 0.5, text, ha="center", va="center", fontsize=9, zorder=3,
                color="black" if is_own else "0.55")  # fmt: skip


def _pale(colour: tuple[float, ...]) -> tuple[float, ...]:
    """Half-way to white, so that black numbers stay readable."""
    return tuple(0.5 + 0.5 * c for c in colour[:3])


def _label_sides(
    ax: Axes, left: float, top: float, height: int, width: int, tall: str, wide: str, right: bool = False
) -> None:
    ax.text(left + width / 2, top + 0.2, wide, ha="center", va="bottom", fontsize=11)
    x, side = (left + width + 0.25, "left") if right else (left - 0.25, "right")
    ax.text(x, top - height / 2, tall, ha=side, va="center", fontsize=11)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], label: str, shift: tuple[float, float]
) -> None:
    style = {"arrowstyle": "-|>", "color": "0.2", "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    ax.annotate("", end, start, arrowprops=style)
    x, y = ((a + b) / 2 + s for a, b, s in zip(start, end, shift, strict=True))
    ax.text(x, y, label, ha="center" if shift[0] == 0 else "left", va="bottom" if shift[1] else "center", fontsize=11)
