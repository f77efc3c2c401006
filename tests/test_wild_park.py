"""The CNN Wild Park: what runs draw, how they train, what is stored."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ngcore import processes
from ngcore.data.images.subsets import load_images
from ngcore.data.zoos import wild_park
from ngcore.data.zoos.cnn import ACTIVATIONS, CNN
from ngcore.data.zoos.populations import read_part, write_part
from ngcore.data.zoos.wild_park import Recipe, draw_architecture, draw_learning_rate, generate_park, train_run

RECIPE = Recipe(
    train_images=130, test_images=100, epochs=2, checkpoints=4
)  # 6 steps, the last of an epoch with 2 images
DRAWS = [draw_architecture(0, run) for run in range(300)]


@pytest.fixture(autouse=True)
def one_thread():
    """As workers have: sums in another order would change the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_draws_are_pure():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert [draw_architecture(0, run) for run in range(20)] == DRAWS[:20]
    assert draw_learning_rate(0, 3) == draw_learning_rate(0, 3)
    assert len(set(DRAWS)) == 300
    assert len({draw_learning_rate(seed, run) for seed in range(3) for run in range(10)}) == 30
    assert draw_architecture(1, 0) != draw_architecture(0, 0)


def test_every_option_is_drawn():
    layers = Counter(len(a.kernel_size) for a in DRAWS)
    assert set(layers) == {2, 3, 4, 5}
    assert {c for a in DRAWS for c in a.channels[1:]} == {4, 8, 16, 32}
    assert {k for a in DRAWS for k in a.kernel_size} == {3, 5, 7}
    assert {name for a in DRAWS for name in a.activation} == set(ACTIVATIONS)
    assert min(layers.values()) > 50  # of 75; each of the others has more draws
    for i in range(5):
        residual = {a.residual[i] for a in DRAWS if len(a.residual) > i}
        assert residual == set(range(-1, i - 1)) | {-1}


def test_all_images_behind_the_first_convolution_have_one_size():
    for architecture in DRAWS[:20]:
        assert architecture.stride == (4,) + (1,) * (len(architecture.kernel_size) - 1)
        x = torch.zeros(1, 3, 32, 32)
        for layer in CNN(architecture).layers:
            x = layer(x)
            assert x.shape[2:] == (8, 8)


def test_learning_rates_are_log_uniform():
    rates = np.log([draw_learning_rate(0, run) for run in range(400)])
    low, high = np.log([3e-4, 1e-2])
    assert low <= rates.min() < low + 0.1
    assert high - 0.1 < rates.max() <= high
    assert rates.mean() == pytest.approx((low + high) / 2, abs=0.2)


def test_checkpoints_are_equally_spaced_up_to_the_end():
    assert RECIPE.checkpoint_steps == [1, 3, 4, 6]
    assert Recipe(10_000, 2_000, 5, 10).checkpoint_steps[:2] == [78, 157]
    assert Recipe(10_000, 2_000, 5, 10).checkpoint_steps[-1] == 785


@pytest.mark.parametrize("changes", [{"checkpoints": 7}, {"checkpoints": 0}])
def test_a_recipe_has_a_step_for_every_checkpoint(changes):
    with pytest.raises(ValueError, match="steps have 1 to"):
        replace(RECIPE, **changes)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"train_images": 0}, {"test_images": 0}, {"seed": -1}])
def test_recipes_of_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="at least 1, a seed at least 0"):
        replace(RECIPE, **changes)


def test_recipes_have_directories_of_their_own():
    names = {
        field: replace(RECIPE, **{field: getattr(RECIPE, field) + 1}).name
        for field in [field.name for field in fields(RECIPE)]
    }
    assert len({RECIPE.name, *names.values()}) == 6


def standardized(split: str, count: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels, with the statistics of all pixels of the training images."""
    train = load_images("cifar10", "train", RECIPE.train_images, cache=cache).pixels.numpy().astype(float)
    images = load_images("cifar10", split, count, cache=cache)
    mean, std = (getattr(train.transpose(1, 0, 2, 3).reshape(3, -1), f)(1)[:, None, None] for f in ("mean", "std"))
    return (images.pixels.numpy() - mean) / std, images.labels.numpy()


def test_a_run_is_the_same_every_time(tmp_path):
    first, second = (train_run(RECIPE, 1, tmp_path) for _ in range(2))
    assert first.rows == second.rows
    assert first.architecture == second.architecture == draw_architecture(0, 1)
    for name, values in first.parameters.items():
        assert torch.equal(values, second.parameters[name])
        assert not torch.equal(values[0], values[1])
    other = train_run(replace(RECIPE, seed=1), 1, tmp_path)
    assert other.rows[0]["learning_rate"] != first.rows[0]["learning_rate"]


def test_training_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    train_run(replace(RECIPE, epochs=1, checkpoints=1), 0, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_rows_say_what_a_run_did(tmp_path):
    """The accuracy is that of the stored weights: it can be measured again from the images."""
    part = train_run(RECIPE, 0, tmp_path)
    assert [row["network"] for row in part.rows] == [f"run0000_step{step:06d}" for step in (1, 3, 4, 6)]
    assert [row["step"] for row in part.rows] == [1, 3, 4, 6]
    assert [row["epoch"] for row in part.rows] == pytest.approx([1 / 3, 1, 4 / 3, 2])
    assert {row["run"] for row in part.rows} == {0}
    assert {row["learning_rate"] for row in part.rows} == {draw_learning_rate(0, 0)}
    images, labels = standardized("test", RECIPE.test_images, tmp_path)
    for i, row in enumerate(part.rows):
        network = CNN(part.architecture).double()
        network.load_state_dict({name: values[i] for name, values in part.parameters.items()})
        predictions = network(torch.from_numpy(images)).argmax(1).numpy()
        assert row["accuracy"] == pytest.approx((predictions == labels).mean(), abs=0.011)  # one tie may be broken
        assert 1 < row["train_loss"] < 10


def test_training_learns(tmp_path):
    """By heart, from few images: the loss falls far below that of guessing, ln 10."""
    part = train_run(Recipe(64, 10, epochs=100, checkpoints=2), 1, tmp_path)
    assert part.rows[0]["train_loss"] > part.rows[1]["train_loss"]
    assert part.rows[1]["train_loss"] < 1


def test_a_diverged_run_is_an_empty_part(tmp_path, monkeypatch):
    monkeypatch.setattr(wild_park, "draw_learning_rate", lambda *_: float("inf"))
    part = train_run(RECIPE, 0, tmp_path)
    assert part.rows == ()
    write_part(tmp_path / "part", part)
    assert len(read_part(tmp_path / "part")) == 0


def test_a_park_is_made_in_a_process_and_extended(tmp_path, monkeypatch):
    generate_park(RECIPE, 1, tmp_path, workers=1)
    monkeypatch.setattr(processes, "pool", ThreadPoolExecutor)
    trained = []
    monkeypatch.setattr(wild_park, "train_run", lambda *a: trained.append(a[1]) or train_run(*a))
    park = generate_park(RECIPE, 3, tmp_path, workers=1)
    assert trained == [1, 2]
    assert park.table["run"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert {path.name for path in (tmp_path / "zoos" / RECIPE.name).iterdir()} == {
        "run0000.safetensors",
        "run0001.safetensors",
        "run0002.safetensors",
        "table.csv",
    }
    for run, part in enumerate(park.parts):
        expected = train_run(RECIPE, run, tmp_path)
        assert part.rows == expected.rows
        for name, values in part.parameters.items():
            assert torch.equal(values, expected.parameters[name])


def test_images_that_are_not_there_fail_once(tmp_path):
    with pytest.raises(ValueError, match="cifar10 train has 50,000 images"):
        generate_park(Recipe(60_000, 100, 1, 1), 2, tmp_path, workers=2)
