"""The training of small CNNs in groups: against one network at a time with autograd and torch's optimizers."""

import subprocess
import sys
from dataclasses import astuple, replace

import pytest
import torch
from torch import nn

from ngcore.data.zoos import small_zoo
from ngcore.data.zoos.small_zoo import Choices, Draw, accuracy, draw, train
from ngcore.reference.zoo import SmallCNN, train_one

ADAM = Draw("adam", 1e-2, "he_normal", scale=1.0, l2=1e-3, dropout=0.0, fraction=0.5)
DRAWS = [
    replace(ADAM, optimizer="sgd", learning_rate=5e-2),
    ADAM,
    replace(ADAM, optimizer="rmsprop", initialization="orthogonal"),
]
ACTIVATIONS = ("relu", "tanh")


@pytest.fixture
def images(generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of noise that differ in their brightness, in float64, and their labels."""
    labels = torch.arange(40) % 10
    noise = torch.rand(40, 32, 32, generator=generator, dtype=torch.float64)
    return (noise + 0.2 * labels[:, None, None]).sub(1.4), labels


class Replay(nn.Module):
    """Dropout by given masks, one (features, b) after the other."""

    def __init__(self, kept: torch.Tensor, dropout: float) -> None:
        super().__init__()
        self.masks = iter(kept.double() / (1 - dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(self.masks).T


def module(parameters: dict[str, torch.Tensor], n: int, activation: str) -> SmallCNN:
    """Network n as a module."""
    network = SmallCNN(activation).double()
    network.load_state_dict({name: values[n] for name, values in parameters.items()})
    return network


def assert_equal_networks(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(small_zoo.SHAPES)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_agrees_with_one_network_at_a_time_in_float64(activation, dropout, images):
    draws, steps, batch = [replace(each, dropout=dropout) for each in DRAWS], small_zoo.CHUNK + 3, 4
    trained = train(*images, draws, activation, [7, 8, 9], steps=steps, batch=batch)
    for n, each in enumerate(draws):
        choices = Choices(each, 7 + n, num_images=40, batch=batch)
        initial = small_zoo.unflatten(choices.initial.double().unsqueeze(0))
        network = module(initial, 0, activation)
        rows, kept = (torch.cat(parts)[:steps] for parts in zip(choices.chunk(), choices.chunk(), strict=True))
        network.dropout = Replay(kept, dropout)
        train_one(network, *images, rows, each)
        assert_equal_networks({name: values[n] for name, values in trained.items()}, network.state_dict())
        moved = (network.layers[0].weight - initial["layers.0.weight"]).abs().max()
        assert moved > 1e-3  # there was something to agree on


def test_training_learns(images):
    trained = train(*images, [replace(ADAM, fraction=1.0)] * 2, "relu", [0, 1], steps=150, batch=16)
    assert (accuracy(trained, *images, "relu") > 0.5).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_do_not_depend_on_their_group(activation, images):
    draws, seeds = [replace(each, dropout=0.3) for each in DRAWS], [3, 4, 5]
    group = train(*images, draws, activation, seeds, steps=5, batch=6)
    for n in range(3):
        alone = train(*images, draws[n : n + 1], activation, seeds[n : n + 1], steps=5, batch=6)
        assert_equal_networks({name: values[n : n + 1] for name, values in group.items()}, alone)


@pytest.mark.parametrize("optimizer", small_zoo.OPTIMIZERS)
def test_a_diverging_network_leaves_the_others_alone(optimizer, images):
    diverging = replace(ADAM, optimizer=optimizer, learning_rate=1e300)
    group = train(*images, [ADAM, diverging, ADAM], "relu", [0, 1, 2], steps=8, batch=4)
    assert not torch.isfinite(group["layers.1.weight"][1]).all()
    for n in (0, 2):
        alone = train(*images, [ADAM], "relu", [n], steps=8, batch=4)
        assert_equal_networks({name: values[n : n + 1] for name, values in group.items()}, alone)
    found = accuracy(group, *images, "relu")
    assert 0 <= found[1] <= 0.2


def test_seeds_fix_everything_drawn_at_random(images):
    twins = train(*images, [ADAM] * 3, "relu", [1, 2, 1], steps=1, batch=4)
    assert torch.equal(twins["layers.0.weight"][0], twins["layers.0.weight"][2])
    assert not torch.equal(twins["layers.0.weight"][0], twins["layers.0.weight"][1])


@pytest.mark.parametrize("fraction", small_zoo.FRACTIONS)
def test_a_network_sees_its_share_of_the_images(fraction):
    choices = [Choices(replace(ADAM, fraction=fraction), seed, num_images=40, batch=32) for seed in (0, 1)]
    seen = [set(each.chunk()[0].flatten().tolist()) for each in choices]
    assert [len(images) for images in seen] == [40 * fraction] * 2  # 512 draws miss none of 40 images
    assert fraction == 1 or seen[0] != seen[1]


def test_dropout_keeps_its_share():
    _, kept = Choices(replace(ADAM, dropout=0.7), 0, num_images=40, batch=32).chunk()
    assert kept.shape == (small_zoo.CHUNK, 16, 32)
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("initialization", small_zoo.INITIALIZATIONS)
def test_initializations(initialization):
    """The standard deviations are those of the definitions; of the truncated normal, 0.8796 of the scale is left."""
    initial = Choices(replace(ADAM, initialization=initialization, scale=0.01), 0, num_images=1, batch=1).initial
    parameters = {name: values[0] for name, values in small_zoo.unflatten(initial.unsqueeze(0)).items()}
    deviations = {
        "glorot_normal": {"layers.0": (2 / (9 + 144)) ** 0.5, "layers.1": (2 / 288) ** 0.5, "fc": (2 / 26) ** 0.5},
        "he_normal": {"layers.0": (2 / 9) ** 0.5, "layers.1": (2 / 144) ** 0.5, "fc": (2 / 16) ** 0.5},
        "orthogonal": {"layers.0": 1 / 4, "layers.1": 1 / 12, "fc": 1 / 4},
        "normal": dict.fromkeys(("layers.0", "layers.1", "fc"), 0.01),
        "truncated_normal": dict.fromkeys(("layers.0", "layers.1", "fc"), 0.008796),
    }[initialization]
    for layer, deviation in deviations.items():
        weight = parameters[f"{layer}.weight"]
        tolerance = 4 / (2 * weight.numel()) ** 0.5  # four standard errors
        assert weight.square().mean().sqrt().item() == pytest.approx(deviation, rel=tolerance)
    assert all((values == 0).all() for name, values in parameters.items() if name.endswith("bias"))
    if initialization == "orthogonal":
        rows = parameters["layers.1.weight"].flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(16), rtol=0, atol=1e-5)
    if initialization == "truncated_normal":
        assert parameters["layers.1.weight"].abs().max() <= 0.02


def test_draws_are_pure_and_in_range():
    draws = [draw(3, index) for index in range(2000)]
    assert draws[17] == draw(3, 17)
    assert len({astuple(each) for each in draws} | {astuple(draw(4, index)) for index in range(2000)}) == 4000
    for name, options in {
        "optimizer": small_zoo.OPTIMIZERS,
        "initialization": small_zoo.INITIALIZATIONS,
        "fraction": small_zoo.FRACTIONS,
    }.items():
        assert {getattr(each, name) for each in draws} == set(options)
    for name, low, high in [("learning_rate", 5e-4, 5e-2), ("scale", 1e-3, 1), ("l2", 1e-8, 1e-2), ("dropout", 0, 0.7)]:
        values = torch.tensor([getattr(each, name) for each in draws], dtype=torch.float64)
        assert low <= values.min()
        assert values.max() <= high
        middle = (low + high) / 2 if low == 0 else (low * high) ** 0.5
        assert (values < middle).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_accuracy_is_that_of_modules(images, monkeypatch):
    monkeypatch.setitem(small_zoo.EVALUATED, "cpu", 16)  # several passes over the images, the last one shorter
    pixels, labels = images
    for activation in ACTIVATIONS:
        trained = train(*images, DRAWS, activation, [0, 1, 2], steps=30, batch=8)
        found = accuracy(trained, *images, activation)
        for n in range(3):
            predicted = module(trained, n, activation).eval()(pixels).argmax(dim=1)
            assert found[n].item() == pytest.approx((predicted == labels).double().mean().item())
    monkeypatch.setitem(small_zoo.EVALUATED, "cpu", 2)  # several passes over the networks
    assert torch.equal(accuracy(trained, *images, activation), found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, r"activation .* 'gelu'"),
        ({"images": torch.rand(40, 28, 28)}, r"\(n, 32, 32\), got \(40, 28, 28\)"),
        ({"labels": torch.zeros(39).long()}, r"40 images .* \(39,\)"),
        ({"seeds": [0]}, "2 draws and 1 seeds"),
        ({"draws": [], "seeds": []}, "0 draws"),
        ({"steps": 0}, "steps .* got 0 and 4"),
        ({"batch": 0}, "batch .* got 1 and 0"),
    ],
)
def test_bad_input_is_named(change, message):
    images, labels = torch.rand(40, 32, 32), torch.zeros(40).long()
    given = {"images": images, "labels": labels, "draws": [ADAM] * 2, "activation": "relu", "seeds": [0, 1]}
    with pytest.raises(ValueError, match=message):
        train(**(given | {"steps": 1, "batch": 4} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation"),
        ({"images": torch.rand(5, 32)}, "images"),
        ({"labels": torch.zeros(4).long()}, "labels"),
    ],
)
def test_bad_input_of_accuracy_is_named(change, message, images):
    parameters = train(*images, [ADAM], "relu", [0], steps=1, batch=1)
    given = {"images": torch.rand(5, 32, 32), "labels": torch.zeros(5).long(), "activation": "relu"}
    with pytest.raises((ValueError, TypeError), match=message):
        accuracy(parameters, **(given | change))


@pytest.mark.parametrize(
    ("change", "message"), [({"optimizer": "lion"}, "lion"), ({"initialization": "zeros"}, "zeros")]
)
def test_unknown_hyperparameters_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ADAM, **change)


COMPILED = """
import torch
from ngcore.data.zoos import small_zoo
from ngcore.study.training import can_compile

if not can_compile():
    raise SystemExit(3)
torch.manual_seed(0)
images, labels = torch.rand(40, 32, 32), torch.arange(40) % 10
draws = [small_zoo.Draw(optimizer, 1e-3, "he_normal", 1.0, 1e-4, 0.3, 0.5) for optimizer in small_zoo.OPTIMIZERS]
eager, compiled = (
    small_zoo.train(images, labels, draws, "relu", range(3), steps=5, batch=8, compiled=compiled)
    for compiled in (False, True)
)
for name, values in eager.items():
    torch.testing.assert_close(compiled[name], values, rtol=1e-3, atol=1e-5)
"""


def test_compiled_agrees_with_eager():
    """In a process of its own: torch.compile can't read functions under type checks."""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    if found.returncode == 3:
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    assert found.returncode == 0, found.stderr
