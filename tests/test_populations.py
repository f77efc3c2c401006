"""CNNs of the zoos against a naive forward pass; populations: stored, found again, resumed after a kill, damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.special import erf, expit

from ngcore import processes
from ngcore.data.zoos import populations
from ngcore.data.zoos.cnn import ACTIVATIONS, CNN, Architecture
from ngcore.data.zoos.populations import (
    Checkpoints,
    GenerationFailed,
    Population,
    PopulationError,
    finite_networks,
    generate,
    read_part,
    write_part,
)

TINY = Architecture((1, 2, 3), (3, 1), (2, 1), (1, 0), ("relu", "tanh"), (-1, -1), classes=2)


def networks(seed: int = 0, count: int = 3, architecture: Architecture = TINY) -> Checkpoints:
    """Checkpoints of one run."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: torch.randn(count, *shape, generator=generator) for name, shape in architecture.shapes.items()}
    rows = tuple({"network": f"run{seed}_{i}", "run": seed, "accuracy": i / count, "step": i} for i in range(count))
    return Checkpoints(architecture, parameters, rows)


def assert_equal(one: Checkpoints, other: Checkpoints) -> None:
    assert one.architecture == other.architecture
    assert one.rows == other.rows
    assert one.parameters.keys() == other.parameters.keys()
    for name, values in one.parameters.items():
        assert torch.equal(values, other.parameters[name])


@pytest.fixture
def threads(monkeypatch):
    """Generate in threads, which start sooner than processes."""
    monkeypatch.setattr(processes, "pool", ThreadPoolExecutor)


# CNNs


@st.composite
def architectures(draw):
    """Arguments of one: its own construction is checked at run time by code that draws random numbers."""
    layers = draw(st.integers(1, 4))
    kernel_size = draw(st.lists(st.sampled_from([1, 3, 5]), min_size=layers, max_size=layers))
    return dict(
        channels=tuple(draw(st.lists(st.integers(1, 5), min_size=layers + 1, max_size=layers + 1))),
        kernel_size=tuple(kernel_size),
        stride=(draw(st.integers(1, 3)),) + (1,) * (layers - 1),  # skip connections need images of one size
        padding=tuple(k // 2 for k in kernel_size),
        activation=tuple(draw(st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=layers, max_size=layers))),
        residual=tuple(draw(st.integers(-1, max(-1, i - 2))) for i in range(layers)),
        classes=draw(st.integers(1, 4)),
    )


def naive_activation(name: str, x: np.ndarray) -> np.ndarray:
    return {
        "relu": lambda: np.where(x > 0, x, 0),
        "gelu": lambda: x * (1 + erf(x / 2**0.5)) / 2,
        "tanh": lambda: np.tanh(x),
        "sigmoid": lambda: expit(x),
        "leaky_relu": lambda: np.where(x > 0, x, 0.01 * x),
        "identity": lambda: x,
    }[name]()


def naive_forward(architecture: Architecture, parameters: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The sums of appendix E.1 one output position and one channel at a time."""
    outputs = [images]
    for i, (k, stride, padding) in enumerate(
        zip(architecture.kernel_size, architecture.stride, architecture.padding, strict=True)
    ):
        weight, bias = parameters[f"layers.{i}.weight"], parameters[f"layers.{i}.bias"]
        x = np.pad(outputs[-1], ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        size = (x.shape[-1] - k) // stride + 1
        y = np.empty((len(x), len(weight), size, size))
        for row in range(size):
            for column in range(size):
                window = x[:, :, row * stride : row * stride + k, column * stride : column * stride + k]
                y[:, :, row, column] = np.tensordot(window, weight, ([1, 2, 3], [1, 2, 3])) + bias
        if architecture.residual[i] >= 0:
            added = outputs[architecture.residual[i] + 1]
            for channel in range(min(y.shape[1], added.shape[1])):
                y[:, channel] += added[:, channel]
        outputs.append(naive_activation(architecture.activation[i], y))
    return outputs[-1].mean((2, 3)) @ parameters["fc.weight"].T + parameters["fc.bias"]


@given(architectures(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_cnn_agrees_with_a_naive_forward_pass(architecture, seed):
    torch.manual_seed(seed)
    architecture = Architecture(**architecture)
    cnn = CNN(architecture).double()
    assert {name: tuple(values.shape) for name, values in cnn.state_dict().items()} == architecture.shapes
    images = torch.randn(2, architecture.channels[0], 7, 7, dtype=torch.float64)
    expected = naive_forward(architecture, {k: v.numpy() for k, v in cnn.state_dict().items()}, images.numpy())
    np.testing.assert_allclose(cnn(images).detach().numpy(), expected, atol=1e-12)


@given(architectures())
@settings(max_examples=20, deadline=None)
def test_architectures_survive_a_file(architecture):
    architecture = Architecture(**architecture)
    assert Architecture.from_json(json.loads(json.dumps(architecture.as_json()))) == architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (3,)}, "at least one convolution"),
        ({"stride": (1,)}, r"stride = \(1,\) is not of 2 convolutions"),
        ({"channels": (1, 0, 3)}, "channels = .* at least 1"),
        ({"padding": (-1, 0)}, "padding = .* at least 0"),
        ({"activation": ("relu", "elu")}, "unknown activation 'elu'; there are relu"),
        ({"residual": (-1, 0)}, r"convolution 1 can add -1 \(nothing\), or one from 0 on .*, not 0"),
        ({"width": 3}, "not an architecture"),
    ],
)
def test_what_makes_no_network(changes, message):
    with pytest.raises(ValueError, match=message):
        Architecture.from_json(TINY.as_json() | changes)


# Networks that are wrong


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, float("nan")])
def test_accuracies_lie_between_0_and_1(accuracy):
    good = networks()
    rows = (good.rows[0], good.rows[1] | {"accuracy": accuracy}, good.rows[2])
    with pytest.raises(PopulationError, match=r"network run0_1: accuracy .* is not within 0 and 1"):
        Checkpoints(TINY, good.parameters, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("fc.bias"), r"networks run0_0, run0_1, run0_2: parameters missing \['fc\.bias'\]"),
        (lambda p: p.update(other=torch.ones(3)), r"unknown \['other'\]"),
        (lambda p: p.update({"fc.bias": torch.ones(3, 3)}), r"fc\.bias has shape \(3, 3\), .* need \(3, 2\)"),
        (
            lambda p: p["fc.bias"][1].fill_(float("inf")),
            r"network run0_1: fc\.bias holds NaN, infinity or a number beyond 1e\+06",
        ),
    ],
)
def test_parameters_fit_the_architecture(change, message):
    good = networks()
    change(good.parameters)
    with pytest.raises(PopulationError, match=message):
        Checkpoints(TINY, good.parameters, good.rows)


def test_rows_have_what_every_population_needs():
    with pytest.raises(PopulationError, match="network a: its row has no run, accuracy"):
        Checkpoints(TINY, networks(count=1).parameters, ({"network": "a"},))


def test_diverged_networks_are_left_out():
    good = networks(count=4)
    good.parameters["layers.0.weight"][1, 0, 0, 0, 0] = float("nan")
    good.parameters["fc.bias"][3, 1] = float("-inf")
    kept = finite_networks(TINY, good.parameters, good.rows)
    assert [row["network"] for row in kept.rows] == ["run0_0", "run0_2"]
    assert torch.equal(kept.parameters["fc.weight"], good.parameters["fc.weight"][[0, 2]])


# Populations


def test_the_table_is_in_the_order_of_the_parts():
    table = Population((networks(1, 2), networks(0, 1))).table
    assert table["network"].tolist() == ["run1_0", "run1_1", "run0_0"]
    assert table["part"].tolist() == [0, 0, 1]
    assert table["layers"].tolist() == [2] * 3
    assert table["channels"].tolist() == [(2, 3)] * 3


@pytest.mark.parametrize("count", [0, 3])
def test_a_part_is_read_as_it_was_written(tmp_path, count):
    path = tmp_path / "new" / "part.safetensors"
    write_part(path, networks(count=count))
    assert_equal(read_part(path), networks(count=count))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def rewrite(path: Path, *, tensors: dict | None = None, **header: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | (tensors or {}), path, metadata | header)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        lambda path: save_file(load_file(path), path),
        lambda path: rewrite(path, rows="[{"),
        lambda path: rewrite(path, rows="[]"),
        lambda path: rewrite(path, rows="[1, 2, 3]"),
        lambda path: rewrite(path, architecture="{}"),
        lambda path: rewrite(path, architecture="[]"),
        lambda path: rewrite(path, architecture='{"channels": "many"}'),
        lambda path: rewrite(path, tensors={"fc.bias": torch.full((3, 2), float("nan"))}),
        lambda path: rewrite(path, tensors={"fc.bias": torch.ones(3, 4)}),
    ],
)
def test_a_damaged_part_is_named(tmp_path, threads, damage):
    makers = {"good": networks, "bad": networks}
    generate(tmp_path, makers, workers=1, title="test")
    damage(tmp_path / "bad.safetensors")
    with pytest.raises(
        PopulationError, match=r"(?s)bad\.safetensors is no part of a population .* delete it and generate"
    ):
        generate(tmp_path, makers, workers=1, title="test")


# Generating


def fail() -> Checkpoints:
    raise RuntimeError("no such network")


def test_a_population_is_stored_and_extended(tmp_path, threads):
    makers = {f"part{i}": partial(networks, i) for i in range(3)}
    generate(tmp_path, makers, workers=2, title="test")
    population = generate(
        tmp_path, dict.fromkeys(makers, fail) | {"part3": partial(networks, 3)}, workers=2, title="test"
    )
    for seed, part in enumerate(population.parts):
        assert_equal(part, networks(seed))
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["network"].tolist() == population.table["network"].tolist()


def test_a_failing_maker_does_not_stop_the_others(tmp_path, threads):
    makers = {"a": fail, "b": networks, "c": fail, "d": networks}
    with pytest.raises(
        GenerationFailed,
        match=r"(?s)2 of 4 parts failed:.*/a.safetensors: RuntimeError\('no such network'\)\n.*/c.safetensors: ",
    ):
        generate(tmp_path, makers, workers=1, title="test")
    assert {path.name for path in tmp_path.iterdir()} == {"b.safetensors", "d.safetensors"}
    assert len(generate(tmp_path, dict.fromkeys(makers, networks), workers=1, title="test")) == 12


def test_a_directory_that_cannot_be_written_is_named(tmp_path, threads):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        generate(tmp_path / "file", {"a": networks}, workers=1, title="test")


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def stop_in_the_middle_of_writing(directory: Path) -> Checkpoints:
    """In a worker: what it stores next ends in the middle of the file."""

    write = Path.write_bytes

    def write_half(path: Path, content: bytes) -> None:
        write(path, content[:-10])
        (directory / "stopped").touch()
        time.sleep(600)

    wait_for((directory / "part1.safetensors").exists)
    Path.write_bytes = write_half
    return networks(2)


def generate_and_stop(directory: Path) -> None:
    """In a process of its own, to be killed."""
    makers = {"part0": partial(networks, 0), "part1": partial(networks, 1)}
    makers |= {"part2": partial(stop_in_the_middle_of_writing, directory), "part3": fail}
    generate(directory, makers, workers=2, title="test")


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for somebody to take notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_generator_goes_on_where_it_was(tmp_path, threads):
    code = f"import test_populations as t; t.generate_and_stop(t.Path({str(tmp_path)!r}))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(populations.__file__).parents[2])])
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    try:
        whole = [tmp_path / name for name in ("stopped", "part0.safetensors", "part1.safetensors")]
        wait_for(lambda: all(path.exists() for path in whole))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (half,) = tmp_path.glob(".*.partial")
    worker = int(half.suffixes[-2][1:])
    wait_for(lambda: not is_alive(worker), 20)
    assert not (tmp_path / "part2.safetensors").exists()

    makers = {"part0": fail, "part1": fail, "part2": partial(networks, 2), "part3": partial(networks, 3)}
    population = generate(tmp_path, makers, workers=1, title="test")
    for seed, part in enumerate(population.parts):
        assert_equal(part, networks(seed))
