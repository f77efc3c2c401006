"""The readers of published populations, on tiny archives of the same formats."""

import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ngcore.data.zoos.archives import SPLITS, read_small_zoo, read_wild_park
from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.data.zoos.populations import PopulationError

SMALL = Architecture((1, 16, 16, 16), (3,) * 3, (2,) * 3, (0,) * 3, ("relu",) * 3, (-1,) * 3)
LAYERS = ("conv2d", "conv2d_1", "conv2d_2", "dense")  # TensorFlow's names


def small_rows(count: int) -> tuple[dict[str, torch.Tensor], list[dict], np.ndarray]:
    """Networks' parameters; the layout and the rows of the same in TensorFlow's order, biases before kernels."""
    torch.manual_seed(0)
    parameters = {name: torch.randn(count, *shape) for name, shape in SMALL.shapes.items()}
    layout, columns, start = [], [], 0
    for layer, ours in zip(LAYERS, ("layers.0", "layers.1", "layers.2", "fc"), strict=True):
        bias, kernel = parameters[f"{ours}.bias"].numpy(), parameters[f"{ours}.weight"].numpy()
        kernel = kernel.transpose(0, 3, 4, 2, 1) if kernel.ndim == 5 else kernel.transpose(0, 2, 1)
        for kind, values in (("bias", bias), ("kernel", kernel)):
            columns.append(values.reshape(count, -1))
            layout.append(
                {
                    "varname": f"sequential/{layer}/{kind}:0",
                    "start_idx": start,
                    "end_idx": start + columns[-1].shape[1],
                    "shape": str(values.shape[1:]),
                }
            )
            start = layout[-1]["end_idx"]
    assert start == 4970  # the published width
    return parameters, layout, np.concatenate(columns, 1)


def metrics_table() -> pd.DataFrame:
    """Three runs of three checkpoints each; the last ones are of step 86."""
    return pd.DataFrame(
        {
            "step": [0, 40, 86] * 3,
            "test_accuracy": np.linspace(0.1, 0.5, 9),
            "config.activation": ["relu"] * 3 + ["tanh"] * 3 + ["relu"] * 3,
            "config.learning_rate": [1e-2] * 9,
            "config.optimizer": ["adam"] * 9,
            "modeldir": ["/somewhere"] * 9,
        }
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    _, layout, weights = small_rows(9)
    np.save(tmp_path / "weights.npy", weights)
    pd.DataFrame(layout).to_csv(tmp_path / "layout.csv", index=False)
    metrics_table().to_csv(tmp_path / "metrics.csv.gz", index=False)
    return tmp_path


def test_small_zoo(small):
    population = read_small_zoo(small)
    parameters, _, _ = small_rows(9)
    assert [part.architecture for part in population.parts] == [SMALL, replace(SMALL, activation=("tanh",) * 3)]
    for part, rows in zip(population.parts, ([2, 8], [5]), strict=True):
        assert [row["run"] for row in part.rows] == rows
        for name, values in part.parameters.items():
            assert torch.equal(values, parameters[name][rows])
    assert population.parts[1].rows == (
        {
            "network": "row5",
            "run": 5,
            "step": 86,
            "accuracy": metrics_table()["test_accuracy"][5],
            "activation": "tanh",
            "optimizer": "adam",
            "learning_rate": 1e-2,
        },
    )
    assert population.rejected == ()


def test_small_zoo_without_the_columns_that_it_can_do_without(small):
    metrics_table()[["config.activation", "step", "test_accuracy"]].to_csv(small / "metrics.csv.gz", index=False)
    assert list(read_small_zoo(small).parts[0].rows[0]) == ["network", "run", "step", "accuracy", "activation"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("test_accuracy", 1.2, r"metrics\.csv\.gz: network row2: test_accuracy 1\.2 is not within 0 and 1"),
        ("test_accuracy", float("nan"), "network row2: test_accuracy nan"),
        ("config.activation", "selu", "network row2: unknown activation 'selu'"),
        ("config.activation", None, "network row2: unknown activation nan"),
    ],
)
def test_small_zoo_leaves_a_bad_line_out(small, column, value, message):
    metrics = metrics_table()
    metrics.loc[2, column] = value
    metrics.to_csv(small / "metrics.csv.gz", index=False)
    with pytest.warns(UserWarning, match=rf"1 networks are left out; the first: .*{message}"):
        population = read_small_zoo(small)
    assert population.table["run"].tolist() == [8, 5]
    assert len(population.rejected) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_small_zoo_leaves_bad_weights_out(small, value):
    _, _, weights = small_rows(9)
    weights[8, 100] = weights[7, 100] = value  # row 7 is not a final one
    np.save(small / "weights.npy", weights)
    with pytest.warns(
        UserWarning, match=r"weights\.npy: network row8: its weights hold NaN, infinity or numbers beyond"
    ):
        population = read_small_zoo(small)
    assert population.table["run"].tolist() == [2, 5]


def test_small_zoo_without_a_good_network(small):
    metrics_table().assign(test_accuracy=-1).to_csv(small / "metrics.csv.gz", index=False)
    with pytest.raises(PopulationError, match=r"holds no network that can be used; .*row2: test_accuracy -1"):
        read_small_zoo(small)
    metrics_table().assign(step=80).to_csv(small / "metrics.csv.gz", index=False)
    with pytest.raises(PopulationError, match=r"holds no network that can be used$"):
        read_small_zoo(small)


@pytest.mark.parametrize("file", ["weights.npy", "metrics.csv.gz", "layout.csv"])
@pytest.mark.parametrize("keep", [None, 0, 10, 60])
def test_small_zoo_with_a_damaged_file(small, file, keep):
    path = small / file
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PopulationError, match=file.replace(".", r"\.")):
        read_small_zoo(small)


@pytest.mark.parametrize("column", ["step", "test_accuracy", "config.activation"])
def test_small_zoo_with_a_column_missing(small, column):
    metrics_table().drop(columns=column).to_csv(small / "metrics.csv.gz", index=False)
    with pytest.raises(PopulationError, match=rf"metrics\.csv\.gz has no column {column}; it has"):
        read_small_zoo(small)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (1, "shape", "(3, 3, 16, 1)", r"conv2d/kernel:0 has shape \(3, 3, 16, 1\), not \(3, 3, 1, 16\)"),
        (7, "shape", "(10, 16)", r"dense/kernel:0 has shape \(10, 16\), not \(16, 10\)"),
        (7, "shape", "__import__('os').getcwd()", r"has shape \(\), not"),
        (3, "varname", "sequential/conv2d_1/gamma:0", r"3 variables \.\.\./kernel:0"),
        (2, "start_idx", 159, r"layers\.1\.bias leave a gap, overlap or don't fit"),
        (7, "end_idx", 4971, r"fc\.weight leave a gap, overlap or don't fit"),
    ],
)
def test_small_zoo_with_another_layout(small, row, column, value, message):
    layout = pd.DataFrame(small_rows(1)[1])
    layout.loc[row, column] = value
    layout.to_csv(small / "layout.csv", index=False)
    with pytest.raises(PopulationError, match=rf"layout\.csv.*{message}"):
        read_small_zoo(small)


@pytest.mark.parametrize("shape", [(9, 4969), (8, 4970), (4970,)])
def test_small_zoo_whose_weights_are_of_something_else(small, shape):
    np.save(small / "weights.npy", np.zeros(shape, np.float32))
    with pytest.raises(PopulationError, match=r"weights\.npy holds float32 of shape .* \(9, 4970\)"):
        read_small_zoo(small)


def test_small_zoo_does_not_unpickle(small):
    np.save(small / "weights.npy", np.full((9, 4970), None), allow_pickle=True)
    with pytest.raises(PopulationError, match=r"weights\.npy can't be read"):
        read_small_zoo(small)


PARK = Architecture((3, 4, 8, 4), (3, 5, 3), (1, 1, 1), (1, 2, 1), ("identity", "gelu", "relu"), (-1, -1, 0))
CONFIG = {
    "n_layers": 3,
    "channels": [3, 4, 8, 4],
    "kernel_size": [3, 5, 3],
    "stride": [1, 1, 1],
    "padding": [1, 2, 1],
    "residual": [-1, -1, 0],
    "activation": ["none", "gelu", "relu"],
}


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return CNN(PARK).state_dict()


def checkpoint(seed: int, **changes: object) -> dict[str, object]:
    return {"model": state(seed), "config": CONFIG, "accuracy": 0.1 * seed} | changes


def save(root: Path, file: str, content: object) -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture
def park(tmp_path: Path) -> Path:
    root = tmp_path / "park"
    for seed, file in enumerate(("a/checkpoint_000010", "a/checkpoint_000020", "b/checkpoint_000010")):
        save(root, f"{file}/checkpoint.pt", checkpoint(seed))
    return root


def test_wild_park(park):
    population = read_wild_park(park)
    assert population.rejected == ()
    assert [part.architecture for part in population.parts] == [PARK, PARK]
    assert [row for part in population.parts for row in part.rows] == [
        {"network": "a/checkpoint_000010/checkpoint", "run": "a", "epoch": 10, "accuracy": 0.0},
        {"network": "a/checkpoint_000020/checkpoint", "run": "a", "epoch": 20, "accuracy": 0.1},
        {"network": "b/checkpoint_000010/checkpoint", "run": "b", "epoch": 10, "accuracy": 0.2},
    ]
    for name, values in population.parts[0].parameters.items():
        assert torch.equal(values, torch.stack([state(0)[name], state(1)[name]]))


def test_wild_park_with_a_run_in_one_folder(tmp_path):
    for step in (1, 2):
        save(tmp_path, f"runs/a/step{step}.pt", checkpoint(step))
    assert read_wild_park(tmp_path).parts[0].rows[1] == {
        "network": "runs/a/step2",
        "run": "runs/a",
        "accuracy": 0.2,
    }


@pytest.mark.parametrize(
    "accuracy",
    [{"accuracy": 0.25}, {"test_acc": 0.25}, {"test/acc": 0.25}, {"last_result": {"test/acc": 0.25, "test/loss": 2.0}}],
)
def test_wild_park_finds_the_accuracy(tmp_path, accuracy):
    save(tmp_path, "a/0.pt", {"model": state(0), "config": CONFIG} | accuracy)
    assert read_wild_park(tmp_path).parts[0].rows[0]["accuracy"] == 0.25


def write_listing(park: Path, splits: object) -> None:
    (park / SPLITS).write_text(json.dumps(splits))


def test_wild_park_with_its_listing(park):
    """The listing's paths begin where its authors' data lay; what it does not list is left out."""
    save(park, "b/checkpoint_000010/checkpoint.pt", {"model": state(2), "config": CONFIG})
    write_listing(
        park,
        {
            "train": {"path": ["cifar10_zooV2/a/checkpoint_000020/checkpoint.pt"], "score": [0.5], "step": [20]},
            "test": {"path": ["cifar10_zooV2/b/checkpoint_000010/checkpoint.pt"], "score": [0.25], "step": [10]},
        },
    )
    table = read_wild_park(park).table
    assert table["network"].tolist() == ["a/checkpoint_000020/checkpoint", "b/checkpoint_000010/checkpoint"]
    assert table["accuracy"].tolist() == [0.5, 0.25]
    assert table["split"].tolist() == ["train", "test"]


def test_wild_park_with_a_listed_network_missing(park):
    paths = ["z/a/checkpoint_000020/checkpoint.pt", "z/c/checkpoint_000010/checkpoint.pt"]
    write_listing(park, {"train": {"path": paths, "score": [0.5, 0.5]}})
    with pytest.warns(UserWarning, match=r"c/checkpoint_000010/checkpoint\.pt is listed but not there"):
        assert len(read_wild_park(park)) == 1


@pytest.mark.parametrize(
    "splits",
    [
        [],
        {"train": []},
        {"train": {"path": ["a"]}},
        {"train": {"path": ["a"], "score": []}},
        {"train": {"path": [1], "score": [1]}},
    ],
)
def test_wild_park_with_a_damaged_listing(park, splits):
    write_listing(park, splits)
    with pytest.raises(
        PopulationError, match=r"cnn_park_splits\.json (is not a table of splits|holds no)|holds no network"
    ):
        read_wild_park(park)


def foreign(monkeypatch: pytest.MonkeyPatch) -> type:
    """OmegaConf's classes, as far as they leave traces in a file: a container holds nodes, which hold values."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig", "random_cnns")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    class DictConfig:
        def __init__(self, content: dict) -> None:
            wrap = {"_metadata": {"object_type": CNNConfig, "ref_type": dict}, "_parent": self}
            self.__dict__ |= wrap | {"_content": {name: Node(value) for name, value in content.items()}}

        def __setstate__(self, state: object) -> None:
            raise AssertionError("code of another library runs")

    class Node:
        def __init__(self, value: object) -> None:
            if isinstance(value, list):
                self._content = [Node(item) for item in value]
            else:
                self._val = value

    class CNNConfig:
        pass

    for cls, module in ((DictConfig, "omegaconf.dictconfig"), (Node, "omegaconf"), (CNNConfig, "random_cnns")):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        setattr(modules[module], cls.__name__, cls)
    return DictConfig


def test_wild_park_reads_omegaconf_without_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        save(tmp_path, "a/0.pt", checkpoint(0, config=foreign(patch)(CONFIG)))
    assert "omegaconf" not in sys.modules
    assert read_wild_park(tmp_path).parts[0].architecture == PARK


class Evil:
    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


@pytest.mark.parametrize("key", ["config", "other"])
def test_wild_park_runs_nothing(park, key):
    mark = park / "mark"
    save(park, "c/0.pt", checkpoint(0, **{key: Evil(os.mkdir, str(mark))}))
    save(park, "c/1.pt", checkpoint(0, **{key: Evil(eval, f"open({str(mark)!r}, 'w')")}))
    with pytest.warns(UserWarning, match=r"c/0\.pt"):
        read_wild_park(park)
    assert not mark.exists()


NAN = {"fc.bias": torch.full((10,), float("nan"))}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a checkpoint needs model, config, but there is list"),
        ({"model": state(0)}, "a checkpoint needs model, config, but there is model"),
        (checkpoint(0, config=None), "a config needs .* but there is NoneType"),
        (checkpoint(0, config={"n_layers": 3}), "a config needs .* but there is n_layers"),
        (checkpoint(0, config=CONFIG | {"n_layers": 2}), "n_layers is 2, but"),
        (checkpoint(0, config=CONFIG | {"activation": ["relu", "elu", "relu"]}), "unknown activation 'elu'"),
        (checkpoint(0, config=CONFIG | {"residual": [-1, 0, -1]}), "convolution 1 can add"),
        (
            checkpoint(0, config=CONFIG | {"kernel_size": [3, 3, 3], "padding": [1, 1, 1]}),
            r"layers\.1\.weight has shape \(1, 8, 4, 5, 5\)",
        ),
        (checkpoint(0, config=CONFIG | {"n_classes": 11}), r"fc\.weight has shape \(1, 10, 4\)"),
        (checkpoint(0, config=CONFIG | {"channels": "3484"}), "."),
        (checkpoint(0, model={k: v for k, v in state(0).items() if k != "fc.bias"}), r"missing \['fc\.bias'\]"),
        (checkpoint(0, model=state(0) | {"norm.weight": torch.ones(4)}), r"unknown \['norm\.weight'\]"),
        (checkpoint(0, model=state(0) | NAN), r"fc\.bias holds NaN, infinity or a number beyond"),
        (checkpoint(0, model=state(0) | {"fc.bias": 3}), "'int'"),
        (checkpoint(0, accuracy=1.5), r"accuracy 1\.5 is not within 0 and 1"),
        (checkpoint(0, accuracy=float("nan")), "accuracy nan"),
        ({"model": state(0), "config": CONFIG, "loss": 1.0}, r"no accuracy \(.*\) among model, config, loss"),
    ],
)
def test_wild_park_leaves_a_bad_checkpoint_out(park, content, message):
    save(park, "b/checkpoint_000020/checkpoint.pt", content)
    with pytest.warns(UserWarning, match=rf"1 networks are left out; the first: .*b/checkpoint_000020.*{message}"):
        population = read_wild_park(park)
    assert population.table["run"].tolist() == ["a", "a", "b"]
    assert len(population.rejected) == 1


def test_wild_park_with_two_architectures_in_a_run(park):
    other = replace(PARK, activation=("tanh",) * 3)
    config = CONFIG | {"activation": list(other.activation)}
    save(park, "a/checkpoint_000030/checkpoint.pt", checkpoint(0, config=config))
    with pytest.warns(UserWarning, match="its architecture is not that of a/checkpoint_000010/checkpoint"):
        assert len(read_wild_park(park)) == 3


@pytest.mark.parametrize("keep", [0, 10, 500, -50])
def test_wild_park_leaves_a_truncated_file_out(park, keep):
    path = park / "a/checkpoint_000020/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=r"a/checkpoint_000020/checkpoint\.pt"):
        assert read_wild_park(park).table["run"].tolist() == ["a", "b"]


def test_wild_park_without_a_good_network(tmp_path):
    with pytest.raises(PopulationError, match=r"holds no network that can be used$"):
        read_wild_park(tmp_path / "nowhere")
    save(tmp_path, "a/0.pt", checkpoint(0, accuracy=2))
    with pytest.raises(PopulationError, match=r"holds no network that can be used; .*a/0\.pt"):
        read_wild_park(tmp_path)
