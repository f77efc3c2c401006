"""Pictures of graphs: what they show, and that nothing covers anything else."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.offsetbox import AnnotationBbox
from torch import nn

from ngcore.graph import mlp, trace
from ngcore.graph.draw import PAPERS_KERNEL, draw, draw_channel_symmetry, draw_graph, draw_kernel_padding

matplotlib.use("Agg")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, image):
        x = torch.relu(self.stem(image))
        return self.head(torch.relu(self.norm(self.body(x)) + x).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def residual():
    module = Residual()
    return trace(module, torch.randn(2, 1, 9, 7)).graph(module.state_dict())


def collections(ax, style):
    """Lines with (True) or without (False) dashes."""
    lines = [item for item in ax.collections if isinstance(item, LineCollection)]
    return [item for item in lines if (item.get_linestyle()[0][1] is not None) == style]


def test_every_kernel_is_a_picture_of_its_own(residual):
    figure = draw_graph(residual, "a residual block")
    figure.canvas.draw()
    pictures = [item for item in figure.axes[0].get_children() if isinstance(item, AnnotationBbox)]
    assert len(pictures) == 3 + 9
    scale = draw(residual, plt.figure().add_subplot())
    shown = np.array([item.offsetbox.get_data() for item in pictures[:3]])
    np.testing.assert_array_equal(shown, [scale.to_rgba(kernel.view(3, 3).numpy()) for kernel in residual.edges[0]])
    boxes = [item.get_window_extent() for item in pictures]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_residual_connections_are_dashed_curves(residual):
    ax = draw_graph(residual).axes[0]
    (dashed,) = collections(ax, style=True)
    assert len(dashed.get_segments()) == 3
    for line in dashed.get_segments():
        assert line[len(line) // 2, 1] > max(line[0, 1], line[-1, 1])
    straight = collections(ax, style=False)[0].get_segments()
    assert all(np.allclose(np.diff(line, 2, axis=0), 0) for line in straight)


def test_layers_have_names_below_all_neurons(residual):
    figure = draw_graph(residual)
    figure.canvas.draw()
    ax = figure.axes[0]
    names = [text.get_text().split("\n") for text in ax.texts]
    assert names[0] == ["input"]
    assert names[1] == ["stem", "convolution", "relu"]
    assert names[3] == ["norm", "normalization", "relu"]
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())
    assert [text.get_text() for text in figure.legends[0].texts] == ["residual connection (1)", "neuron without bias"]


def test_groups_of_one_layer_stand_one_above_another():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(torch.cat([torch.relu(self.left(x)), torch.tanh(self.right(x))], -1))

    module = Branches()
    figure = draw_graph(trace(module, torch.randn(4, 3)).graph(module.state_dict()))
    figure.canvas.draw()
    ax = figure.axes[0]
    places = [tuple(p) for c in ax.collections if not isinstance(c, LineCollection) for p in c.get_offsets().tolist()]
    assert len(set(places)) == len(places) == 3 + 5 + 2
    assert ax.texts[1].get_text().split("\n") == ["left", "linear", "relu", "·", "right", "linear", "tanh"]
    assert figure.bbox.contains(*ax.texts[1].get_window_extent().corners()[0])


def test_an_attention_block():
    module = Attention()
    graph = trace(module, torch.randn(2, 5, 4)).graph(module.state_dict())
    figure = draw_graph(graph)
    figure.canvas.draw()
    neurons = [len(item.get_offsets()) for item in figure.axes[0].collections if not isinstance(item, LineCollection)]
    assert sum(neurons) == graph.wiring.num_nodes
    assert "product of neurons" in [text.get_text() for text in figure.legends[0].texts]


def test_a_crowded_layer_colours_its_edges_instead():
    module = nn.Sequential(nn.Conv1d(8, 16, 3), nn.ReLU(), nn.Conv1d(16, 2, 3))
    graph = trace(module, torch.randn(2, 8, 9)).graph(module.state_dict())
    ax = plt.figure().add_subplot()
    scale = draw(graph, ax)
    edges = [item for item in collections(ax, style=False) if len(item.get_segments()) == 128][-1]
    kernels = graph.edges[0].detach().flatten(0, 1)
    strongest = kernels.gather(1, kernels.abs().argmax(1, keepdim=True)).squeeze(1)
    np.testing.assert_array_equal(edges.get_colors(), scale.to_rgba(strongest.numpy()))


def test_an_mlp_keeps_its_coordinates(random_graph):
    ax = plt.figure().add_subplot()
    draw(random_graph(mlp([2, 3, 1]))[0], ax)
    places = [item.get_offsets().tolist() for item in ax.collections if not isinstance(item, LineCollection)]
    assert places == [[[0, 0.5], [0, -0.5]], [[1, 1], [1, 0], [1, -1]], [[2, 0]]]


def test_figure_5_permutes_the_feature_map_and_not_the_output():
    first, second = nn.Conv2d(2, 3, 3).double(), nn.Conv2d(3, 2, 3).double()
    figure = draw_channel_symmetry(first, second, torch.randn(2, 9, 9, dtype=torch.float64), [2, 0, 1])
    figure.canvas.draw()
    ax = figure.axes[0]
    pictures = [np.asarray(item.get_array()) for item in ax.images]
    rows = pictures[: len(pictures) // 2], pictures[len(pictures) // 2 :]
    inputs, filters, features, second_filters, outputs = (
        tuple(np.stack(row[start:end]) for row in rows) for start, end in ((0, 2), (2, 8), (8, 11), (11, 17), (17, 19))
    )
    np.testing.assert_array_equal(inputs[0], inputs[1])
    np.testing.assert_allclose(features[0][[2, 0, 1]], features[1], rtol=0, atol=1e-12)
    assert not np.allclose(features[0], features[1])
    np.testing.assert_array_equal(filters[0].reshape(3, 2, 3, 3, 4)[[2, 0, 1]], filters[1].reshape(3, 2, 3, 3, 4))
    swapped = second_filters[0].reshape(2, 3, 3, 3, 4)[:, [2, 0, 1]]
    np.testing.assert_array_equal(swapped, second_filters[1].reshape(2, 3, 3, 3, 4))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-12)
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_figure_6_shows_the_papers_numbers():
    ax = draw_kernel_padding().axes[0]
    cells = [text.get_text().replace("−", "-") for text in ax.texts]
    numbers = [cell for cell in cells if cell.lstrip("-").replace(".", "").isdigit()]
    strip = "0 0 0 0 0 0 0.1 -0.2 0.1 0 0 0.1 -0.3 0.2 0 0 0.2 -0.2 0.3 0 0 0 0 0 0"
    assert numbers[:9] == [f"{x:g}" for row in PAPERS_KERNEL for x in row]
    assert numbers[9:34] == numbers[34:] == strip.split()


def test_errors(random_graph):
    with pytest.raises(ValueError, match="one network"):
        draw_graph(random_graph(mlp([2, 3, 1])))
    with pytest.raises(ValueError, match="does not fit into the window"):
        draw_kernel_padding(window=(2, 2))
    image = torch.randn(1, 9, 9)
    with pytest.raises(ValueError, match="order must permute the 3 filters"):
        draw_channel_symmetry(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3), image, [0, 1])
    with pytest.raises(ValueError, match="second layer must read"):
        draw_channel_symmetry(nn.Conv2d(1, 3, 3), nn.Conv2d(4, 2, 3), image, [0, 1, 2])
