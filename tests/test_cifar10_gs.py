"""The generator of CIFAR10-GS: a pure function of its recipe, whole or in parts; images, rows and errors."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ngcore.data.images.subsets import load_images
from ngcore.data.zoos import cifar10_gs, small_zoo
from ngcore.data.zoos.cifar10_gs import PART, Recipe, generate_zoo, train_part
from ngcore.data.zoos.cnn import CNN

RECIPE = Recipe(train_images=50, test_images=40, steps=3)


def stored(directory):
    return {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))}


def test_more_networks_go_on_from_fewer_and_are_the_same(tmp_path):
    few = generate_zoo(RECIPE, PART, tmp_path / "a", 1)
    directory = tmp_path / "a" / "zoos" / RECIPE.name
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")}
    more = generate_zoo(RECIPE, 2 * PART, tmp_path / "a", 2)
    whole = generate_zoo(RECIPE, 2 * PART, tmp_path / "b", 1)
    assert (len(few), len(more)) == (PART, 2 * PART)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    one, other = stored(directory), stored(tmp_path / "b" / "zoos" / RECIPE.name)
    assert one.keys() == other.keys() == {"000000_000015.safetensors", "000016_000031.safetensors"}
    for name in one:
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])
    assert more.table.equals(whole.table)
    assert more.table["activation"].tolist() == ["relu"] * PART + ["tanh"] * PART
    assert (directory / "table.csv").read_text().count("\n") == 2 * PART + 1


def test_rows_are_what_was_drawn_and_what_the_networks_reach(tmp_path):
    part = train_part(RECIPE, range(2), tmp_path, compiled=False)
    for index, row in enumerate(part.rows):
        drawn = small_zoo.draw(RECIPE.seed, index)
        assert {name: row[name] for name in vars(drawn)} == vars(drawn)
        assert row["run"] == index
    grey = []
    for split, count in (("train", RECIPE.train_images), ("test", RECIPE.test_images)):
        images = load_images("cifar10", split, count, cache=tmp_path)
        grey.append(np.tensordot(images.pixels.numpy(), [0.299, 0.587, 0.114], axes=(1, 0)))
    test = torch.tensor((grey[1] - grey[0].mean()) / grey[0].std(ddof=1), dtype=torch.float32).unsqueeze(1)
    network = CNN(part.architecture).eval()
    for i, row in enumerate(part.rows):
        network.load_state_dict({name: values[i] for name, values in part.parameters.items()})
        reached = (network(test).argmax(1) == images.labels).float().mean().item()
        assert row["accuracy"] == pytest.approx(reached, abs=1e-6)


def test_a_network_that_diverges_is_left_out_alone(tmp_path, monkeypatch):
    train = small_zoo.train

    def spoiled(*arguments, **keywords):
        parameters = train(*arguments, **keywords)
        parameters["fc.bias"][1] = torch.inf
        return parameters

    monkeypatch.setattr(cifar10_gs, "train", spoiled)
    part = train_part(RECIPE, range(4), tmp_path, compiled=False)
    assert [row["run"] for row in part.rows] == [0, 2, 3]


@pytest.mark.parametrize("changes", [{"steps": 0}, {"train_images": 0}, {"seed": -1}])
def test_recipes_of_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="at least 1, a seed at least 0"):
        Recipe(**{"train_images": 10, "test_images": 10, "steps": 1, **changes})
