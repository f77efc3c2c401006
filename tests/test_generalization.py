"""Predicting generalization: splits, targets, methods and runs, on tiny populations."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau

from ngcore.data.zoos import cifar10_gs, wild_park
from ngcore.data.zoos.cnn import CNN
from ngcore.models.baselines import StatNN
from ngcore.models.baselines.stat_nn import statistics
from ngcore.study.profiles import declared_parameters, plan_notebooks
from ngcore.study.runs import ROOT, identity
from ngcore.study.training import DivergedError, Schedule
from ngcore.tasks import execute, zoo_company, zoos
from ngcore.tasks import generalization as task

SMALL = zoos.Zoo(48, cifar10_gs.Recipe(64, 40, 4))
PARK = zoos.Zoo(24, wild_park.Recipe(64, 40, 1, 1))
SCHEDULE = Schedule(1, 4, warmup=2)
RATES = dict.fromkeys(task.METHODS, 1e-3)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NGCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        zoos.load.cache_clear()
        for zoo in (SMALL, PARK):
            zoo.population(workers=2)
        yield
        zoos.load.cache_clear()


def config(dataset, method, **changes):
    (found,) = task.configs_of(dataset, (SMALL, PARK), (method,), 1, SCHEDULE, RATES, **changes)
    return found


def test_splits_share_no_training_run_and_lose_no_network():
    table = pd.DataFrame(
        {
            "dataset": ["cifar10_wild_park"] * 300 + ["cifar10_gs"] * 50,
            "run": [i // 10 for i in range(300)] + [*range(50)],
        }
    )
    rows = zoos.split_rows(table)
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(350))
    keys = {split: {(table.dataset[i], table.run[i]) for i in own.tolist()} for split, own in rows.items()}
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other
    sizes = {split: sum(name == "cifar10_gs" for name, _ in own) for split, own in keys.items()}
    assert sizes == {"train": 20, "validation": 5, "test": 25}  # the paper's: half for testing, of the rest a fifth


def test_another_seed_splits_otherwise_and_as_cleanly():
    table = pd.DataFrame({"dataset": "cifar10_wild_park", "run": np.repeat(np.arange(40), 3)})
    splits = [zoos.split_rows(table, seed) for seed in range(3)]
    for rows in splits:
        assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(120))
        runs = [set(table["run"][own.numpy()]) for own in rows.values()]
        assert [len(own) for own in runs] == [24, 6, 10]
        assert not set.intersection(*runs)
    assert not torch.equal(splits[0]["test"], splits[1]["test"])
    assert torch.equal(splits[0]["test"], zoos.split_rows(table)["test"])
    table["split"] = np.repeat(["train", "val", "test", "train"], 30)  # as its publisher says
    told = {name: rows.tolist() for name, rows in zoos.split_rows(table).items()}
    assert told == {"train": [*range(30), *range(90, 120)], "validation": [*range(30, 60)], "test": [*range(60, 90)]}
    assert torch.equal(zoos.split_rows(table, 1)["test"], splits[1]["test"])


def test_statistics_are_numpys_of_every_layer():
    networks = zoos.load((PARK,), False)
    frame = networks.frame
    found = statistics(networks.graphs, frame).view(len(networks.table), frame.layers + 1, 2, 7)
    row = 0
    for graph in networks.graphs:
        for name, values in graph.state_dict().items():
            kind = 0 if name.endswith("weight") else 1
            slot = frame.layers if name.startswith("fc") else int(name.split(".")[1])
            for i, own in enumerate(values.numpy().reshape(len(values), -1)):
                expected = [own.mean(), own.var(), *np.quantile(own, [0, 0.25, 0.5, 0.75, 1])]
                np.testing.assert_allclose(found[row + i, slot, kind], expected, atol=1e-6)
        depth = len([group for group in graph.wiring.groups if group.role == "hidden"])
        assert (found[row : row + graph.num_networks, depth : frame.layers] == 0).all()
        row += graph.num_networks
    assert row == len(networks.table)


def test_stat_nn_has_the_papers_size():
    assert sum(p.numel() for p in StatNN(84).parameters()) == 1_087_001


def test_targets_lie_within_0_and_1_and_keep_the_order():
    small, park = (zoos.load((zoo,), False).table for zoo in (SMALL, PARK))
    np.testing.assert_array_equal(task.targets_of(small, "accuracy"), small["accuracy"])
    np.testing.assert_array_equal(task.targets_of(small, "activation"), small["activation"] == "tanh")
    rates = task.targets_of(park, "learning_rate")
    assert (rates.min(), rates.max()) == (0, 1)
    assert kendalltau(rates, park["learning_rate"]).statistic == pytest.approx(1)
    assert task.targets_of(park, "epoch").max() == 1
    with pytest.raises(ValueError, match="no 'step' to predict"):
        task.targets_of(small, "epoch")
    with pytest.raises(ValueError, match="unknown target 'size'"):
        task.targets_of(small, "size")


def test_activations_can_be_hidden():
    networks = zoos.load((SMALL,), True)
    names = {group.activation for graph in networks.graphs for group in graph.wiring.groups}
    assert names == {"identity", "relu"}  # the output's, and everybody's
    assert {name for architecture in networks.architectures for name in architecture.activation} == {"relu"}
    names = {group.activation for graph in zoos.load((SMALL,), False).graphs for group in graph.wiring.groups}
    assert names == {"identity", "relu", "tanh"}


@pytest.mark.parametrize("split", ["shallow_to_deep", "narrow_to_wide"])
def test_shapes_are_apart(split):
    networks = zoos.load((PARK,), False)
    rows = task.rows_of(networks, split)
    assert set(rows) == {"train", "validation", "same", "other"}
    measure = networks.table["layers"] if split == "shallow_to_deep" else networks.table["channels"].map(np.mean)
    limit = {"shallow_to_deep": task.SHALLOW, "narrow_to_wide": task.NARROW}[split]
    for name, own in rows.items():
        assert ((measure[own.numpy()] > limit) == (name == "other")).all()
    with pytest.raises(ValueError, match=r"leaves no networks for .*: 48 training runs are too few"):
        task.rows_of(zoos.load((SMALL,), False), split)


@pytest.mark.parametrize(
    ("dataset", "method"), [(name, method) for name, methods in task.ROWS.items() for method in methods]
)
def test_a_run_is_stored_and_scores_its_predictions(dataset, method):
    record = execute(config(dataset, method))
    metrics = record["metrics"]
    predicted, true = metrics[f"test_{dataset}_predicted"], metrics[f"test_{dataset}_true"]
    assert all(0 <= value <= 1 for value in predicted)
    assert (
        len(predicted)
        == len(true)
        == len(zoos.split_rows(zoos.load((SMALL if dataset == "cifar10_gs" else PARK,), False).table)["test"])
    )
    expected = np.nan_to_num(kendalltau(predicted, true).statistic)
    assert metrics[f"test_{dataset}_tau"] == pytest.approx(expected, abs=0.01)  # predictions are stored rounded
    table = zoos.load((SMALL if dataset == "cifar10_gs" else PARK,), False).table
    accuracy = {(row["run"], round(row["accuracy"], 6)) for row in table.to_dict("records")}
    assert set(zip(metrics[f"test_{dataset}_run"], true, strict=True)) <= accuracy
    assert execute(config(dataset, method)) == record


def test_one_model_reads_both_populations():
    metrics = execute(config("both", "NG-GNN"))["metrics"]
    assert {"test_cifar10_gs_tau", "test_cifar10_wild_park_tau"} <= set(metrics)


def test_the_control_trains_on_other_targets_and_is_tested_on_the_true_ones():
    real, control = (execute(config("cifar10_gs", "StatNN", shuffled=shuffled)) for shuffled in (False, True))
    assert real["metrics"]["test_cifar10_gs_true"] == control["metrics"]["test_cifar10_gs_true"]
    assert real["metrics"]["train_loss"] != control["metrics"]["train_loss"]


def test_a_split_of_its_own_is_a_run_of_its_own():
    first, other = (config("cifar10_wild_park", "StatNN", split_seed=seed) for seed in (0, 1))
    assert "split_seed" not in identity(first)
    runs = [set(execute(one)["metrics"]["test_cifar10_wild_park_run"]) for one in (first, other)]
    assert runs[0] != runs[1]


def test_the_plan_splits_the_park_anew_once_per_seed_of_splitting():
    ((notebook, changes),) = plan_notebooks("quick", ["03"], ROOT / "notebooks").items()
    asked = next(task.runs(declared_parameters(notebook) | changes | {"park_splits": {"StatNN": 3, "NG-T": 2}}))
    found = [(one.method, one.dataset, one.seed, one.split_seed) for one in asked if getattr(one, "split_seed", 0)]
    assert found == [
        (method, "cifar10_wild_park", 0, split) for method, split in (("StatNN", 1), ("StatNN", 2), ("NG-T", 1))
    ]


def test_what_changes_a_prediction_and_what_does_not():
    moved = zoo_company.prediction_changes(others=3)["prediction moves by"].tolist()
    assert max(moved[:2]) < 1e-12
    assert min(moved[2:]) > 1e-6


def test_predictions_do_not_depend_on_the_order_or_the_company():
    networks = zoos.load((PARK,), False)
    for method in ("NG-GNN", "NG-T"):
        torch.manual_seed(0)
        model = task.build_model(method, networks).eval()
        rows = task.rows_of(networks, "random")
        targets = torch.zeros(len(networks.table))
        problem = task.Prediction(
            model,
            networks.collection,
            networks.collection.sizes,
            rows,
            networks.table["run"].tolist(),
            targets,
            targets,
            "mse",
            task.METHODS[method].chunk,
        )
        every = torch.randperm(len(networks.table))
        with torch.no_grad():
            together = problem.predictions(every)
            alone = torch.cat([problem.predictions(every[i : i + 1]) for i in range(len(every))])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", task.METHODS)
def test_models_start_near_the_mean_target(method):
    networks = zoos.load((SMALL,), False)
    rows = task.rows_of(networks, "random")
    targets = torch.full((len(networks.table),), 0.2)
    torch.manual_seed(0)
    model = task.build_model(method, networks).eval()
    inputs = task.METHODS[method].inputs(networks)
    sizes, runs = networks.collection.sizes, networks.table["run"].tolist()
    problem = task.Prediction(model, inputs, sizes, rows, runs, targets, targets, "bce", task.METHODS[method].chunk)
    with torch.no_grad():
        predicted = problem.predictions(rows["train"])
        last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        assert last.out_features == 1
        last.weight.zero_()
        torch.testing.assert_close(problem.predictions(rows["train"]), targets[rows["train"]])
    assert (predicted - 0.2).abs().median() < 0.1


def test_losses_are_the_means_that_they_say():
    networks = zoos.load((SMALL,), False)
    rows = task.rows_of(networks, "random")
    known = torch.tensor(networks.table["accuracy"].to_numpy(), dtype=torch.float32)
    sizes, runs = networks.collection.sizes, networks.table["run"].tolist()
    for loss in ("bce", "mse"):
        torch.manual_seed(0)
        model = task.build_model("StatNN", networks)
        problem = task.Prediction(model, networks.statistics, sizes, rows, runs, known, known, loss, None)
        first = torch.arange(5)
        share = model(networks.statistics[rows["train"][first]])[:, 0].sigmoid()
        wanted = known[rows["train"][first]]
        each = -(wanted * share.log() + (1 - wanted) * (1 - share).log()) if loss == "bce" else (share - wanted) ** 2
        torch.testing.assert_close(problem.loss(first), each.sum())


def test_the_wiring_computes_what_the_network_does():
    for run in range(3):
        architecture = wild_park.draw_architecture(0, run)
        network = CNN(architecture).double().eval()
        wiring = zoos.wiring_of(architecture)
        twin = wiring.symmetry.permute(network.state_dict(), wiring.symmetry.random())
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        expected = network(images)
        torch.testing.assert_close(torch.func.functional_call(network, twin, images), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("dataset", "method", "changes", "message"),
    [
        ("cifar10_gs", "DWSNet", {}, "unknown methods DWSNet"),
        ("cifar10_gs", "StatNN", {"loss": "mae"}, "unknown loss 'mae'"),
        ("cifar10_wild_park", "NFN_HNP", {}, "different shapes can't be stacked"),
        ("cifar10_wild_park", "StatNN", {"split": "by_age"}, "unknown split 'by_age'"),
    ],
)
def test_what_cannot_be_run_is_named(dataset, method, changes, message):
    with pytest.raises(ValueError, match=message):
        execute(config(dataset, method, **changes))


def test_a_prediction_that_is_not_finite_is_named():
    networks = zoos.load((SMALL,), False)
    rows = task.rows_of(networks, "random")
    bad = networks.statistics.clone()
    bad[rows["test_cifar10_gs"][3]] = torch.nan
    targets, runs = torch.zeros(len(bad)), networks.table["run"].tolist()
    model = task.build_model("StatNN", networks)
    problem = task.Prediction(model, bad, networks.collection.sizes, rows, runs, targets, targets, "bce", None)
    with torch.no_grad(), pytest.raises(DivergedError, match=f"network {rows['test_cifar10_gs'][3]} of the table"):
        problem.test()
