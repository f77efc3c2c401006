"""What a notebook shows of networks: a few lines, and pictures of small graphs."""

import base64
import io
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from PIL import Image
from torch import nn

from ngcore.data.inrs import siren
from ngcore.data.inrs.sets import INRSet
from ngcore.data.zoos.cnn import Architecture
from ngcore.data.zoos.populations import Checkpoints, Population
from ngcore.graph import mlp, trace

matplotlib.use("Agg")
SIREN = mlp(siren.SIZES, "siren")


def weights(wiring, *batch):
    return {name: torch.randn(*batch, *shape) for name, shape in wiring.shapes.items()}


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return trace(nn.TransformerEncoder(layer, 4), torch.randn(2, 3, 8))


def population():
    architectures = [Architecture((3, c), (3,), (2,), (1,), ("relu",), (-1,)) for c in (4, 8)]
    parts = [
        Checkpoints(
            architecture,
            {name: torch.zeros(2, *shape) for name, shape in architecture.shapes.items()},
            tuple({"network": i, "run": i, "accuracy": 0.1 + 0.2 * i} for i in range(2)),
        )
        for architecture in architectures
    ]
    return Population(tuple(parts), ("network 9 diverged",))


def inr_set():
    parameters = siren.unflatten(siren.initialize(range(5)))
    return INRSet(parameters, torch.tensor([0, 3, 0, 1, 1]), torch.arange(5), torch.full((5,), 25.0))


@pytest.mark.parametrize(
    ("shown", "lines"),
    [
        (SIREN, ["67 neurons in 4 groups, 1,120 edges (linear), 1,185 parameters", "hidden: 32, 32 (siren)"]),
        (SIREN.graph(weights(SIREN)), ["one network, torch.float32 on cpu", "1,185 parameters"]),
        (SIREN.graph(weights(SIREN, 2, 3)), ["2 x 3 networks", "hidden: 32, 32 (siren)"]),
        (transformer(), ["product, residual, normalization", r"groups of 2 to 24 (identity, relu)"]),
        (inr_set(), ["5 INRs of layers 2-32-32-1, 1,185 parameters each", "classes [0, 1, 3], PSNR 25.0 dB"]),
        (population(), ["4 networks of 2 architectures in 2 parts", "accuracies 10.0% to 30.0%, 1 rejected"]),
        (population().parts[0], ["2 networks of Architecture(channels=(3, 4)"]),
        (Population(()), ["0 networks of 0 architectures"]),
    ],
)
def test_a_representation_is_a_few_lines_that_say_what_it_is(shown, lines):
    text = repr(shown)
    assert text.startswith(type(shown).__name__)
    assert len(text.splitlines()) <= 6
    assert max(map(len, text.splitlines())) <= 200
    for line in lines:
        assert line in text


@pytest.mark.parametrize("wiring", [mlp((2, 5, 5, 1), "siren"), SIREN, transformer()], ids=["small", "siren", "other"])
def test_notebooks_show_small_graphs_as_pictures(wiring):
    before = plt.get_fignums()
    for shown in (wiring, wiring.graph(weights(wiring))):
        if wiring.num_nodes > 200:
            assert shown._repr_html_() is None
            continue
        html = shown._repr_html_()
        picture = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]*)"', html).group(1))
        assert min(Image.open(io.BytesIO(picture)).size) > 200
        assert f"{wiring.num_parameters:,} parameters" in html
    assert plt.get_fignums() == before, "a figure left open is shown twice"


def test_batches_are_shown_as_text():
    assert SIREN.graph(weights(SIREN, 2))._repr_html_() is None


def test_jupyter_displays_picture_and_text():
    formats, _ = DisplayFormatter().format(SIREN)
    assert formats["text/plain"] == repr(SIREN)
    assert "<img" in formats["text/html"]
