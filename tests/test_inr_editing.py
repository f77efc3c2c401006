"""INR editing: targets against other libraries, the identity check, and runs that fail without losing anything."""

from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.ndimage
import torch

from ngcore.data.inrs import siren
from ngcore.data.inrs.edits import ANGLE, dilate, erode, rotate
from ngcore.digests import tensor_digest
from ngcore.models.baselines import ConstantEdit, PictureFilter
from ngcore.study import training
from ngcore.study.execution import DEFAULT
from ngcore.study.run import Job, silent
from ngcore.study.runs import RunError, StoredRun, cache_directory
from ngcore.study.training import DivergedError, Schedule
from ngcore.tasks import editing_pictures, editing_tables, execute
from ngcore.tasks import inr_editing as task
from ngcore.tasks.inr_sets import WIRING, INRData, load_data
from ngcore.tasks.rows import rows_of

matplotlib.use("Agg")

DATA = INRData("mnist", train=16, validation=8, test=12, steps=3, learning_rate=1e-3)
CLOTHES = replace(DATA, dataset="fashion_mnist")
EDITORS = [name for name in task.METHODS if name not in task.CONTROLS]
CONFIG = task.Config("mnist", "DWSNet", 0, 1, "dilation", 0, DATA, None, Schedule(2, batch=4, warmup=2, clip=1.0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(config):
    """Where a run without transfer is stored."""
    targets = task.targets_of(config.data, config.edit, "cpu")
    digest = f"{load_data(config.data, 'cpu')[1]}+{tensor_digest(targets.values())}"
    return StoredRun.of(config, digest, cache_directory())


# Edits


@pytest.mark.parametrize(("edit", "reference"), [(dilate, "grey_dilation"), (erode, "grey_erosion")])
def test_morphology_is_scipys(edit, reference):
    images = torch.rand(3, 9, 9)
    for image, edited in zip(images, edit(images), strict=True):
        expected = getattr(scipy.ndimage, reference)(image.numpy(), size=(3, 3), mode="nearest")
        np.testing.assert_array_equal(edited.numpy(), expected)


def test_rotation_is_scipys_inside_the_image():
    images = torch.zeros(2, 15, 15)
    images[:, 4:11, 4:11] = torch.rand(2, 7, 7)
    for image, edited in zip(images, rotate(images), strict=True):
        expected = scipy.ndimage.rotate(image.numpy(), ANGLE, reshape=False, order=1)
        np.testing.assert_allclose(edited.numpy(), expected, atol=1e-5)


def test_rotation_is_counter_clockwise():
    """A spot at the right of the centre moves up."""
    image = torch.zeros(1, 15, 15)
    image[0, 7, 12] = 1
    rows = torch.arange(15.0).unsqueeze(1)
    assert (rotate(image)[0] * rows).sum() / rotate(image).sum() < 6.5


# The identity check


@pytest.mark.parametrize("method", EDITORS)
def test_without_scales_an_editor_changes_nothing(method):
    state = siren.unflatten(siren.initialize(range(5)))
    editor = task.build_editor(method, networks=2).eval()
    editor.fit_normalization(WIRING.graph(state))
    drawn = task.rendered(editor, state)
    assert (drawn - siren.render(state)).abs().max() > 0
    with torch.no_grad():
        editor.node_scale.zero_()
        editor.edge_scale.zero_()
    torch.testing.assert_close(task.rendered(editor, state), siren.render(state), rtol=0, atol=0)


def loaded(**changes):
    return task.load(replace(CONFIG, **changes), "cpu")[0]


def test_an_editor_without_scales_scores_as_no_edit_and_both_as_one_by_one():
    pictures = loaded(transfer=CLOTHES)
    editor = task.build_editor("DWSNet").eval()
    problem = task.Editing(editor, pictures)
    with torch.no_grad():
        editor.node_scale.zero_()
        editor.edge_scale.zero_()
        found = problem.test()
    unedited = execute(replace(CONFIG, method="no edit", transfer=CLOTHES))["metrics"]
    for name, value in found.items():
        assert unedited[name] == (value if name.startswith("example") else pytest.approx(value, rel=1e-3)), name
    assert found["examples_edited"] == found["examples_unedited"]
    for split in ("test", "transfer"):
        inrs, targets = pictures.sets[split], pictures.targets[split]
        each = [
            ((siren.render({name: values[i] for name, values in inrs.parameters.items()}) - target) ** 2).mean().item()
            for i, target in enumerate(targets)
        ]
        np.testing.assert_allclose(unedited[f"{split}_errors"], each, rtol=1e-3)
        assert unedited[f"{split}_mse"] == pytest.approx(np.mean(each), rel=1e-5)


# Controls


def test_the_constant_edit_is_seven_numbers_and_is_fitted_by_the_loop():
    editor = task.build_editor("constant edit")
    assert sum(p.numel() for p in editor.parameters()) == 7
    state = siren.unflatten(siren.initialize(range(3)))
    before = {name: values.clone() for name, values in state.items()}
    torch.testing.assert_close(task.rendered(editor, state), siren.render(state))
    with torch.no_grad():
        editor.weight_factor.copy_(torch.tensor([2.0, 3.0, 5.0]))
        editor.bias_factor.copy_(torch.tensor([7.0, 11.0, 13.0]))
        editor.offset.fill_(17.0)
    edited = editor(WIRING.graph(state)).state_dict()
    for name, factor in zip(state, (2, 7, 3, 11, 5, 13), strict=True):
        expected = factor * before[name] + (17 if name == "layers.2.bias" else 0)
        torch.testing.assert_close(edited[name], expected.unsqueeze(0), rtol=0, atol=0)
        assert torch.equal(state[name], before[name])
    metrics = execute(replace(CONFIG, method="constant edit"))["metrics"]
    assert metrics["steps"] == CONFIG.schedule.epochs * DATA.train // CONFIG.schedule.batch
    with pytest.raises(ValueError, match="makes one network of one, not 2"):
        task.build_editor("constant edit", networks=2)


def test_every_number_of_the_constant_edit_learns():
    editor = ConstantEdit(WIRING).double()
    task.rendered(editor, siren.unflatten(siren.initialize(range(3)).double())).square().mean().backward()
    zero = editor.bias_factor.grad[:2]  # biases of sine layers start at 0, and a factor changes nothing
    assert editor.weight_factor.grad.all()
    assert editor.bias_factor.grad[2] != 0
    assert editor.offset.grad != 0
    assert not zero.any()


def test_the_filter_is_least_squares_over_all_pixels():
    generator = torch.Generator().manual_seed(0)
    pictures, targets = torch.rand(2, 6, 7, 7, generator=generator, dtype=torch.float64)
    found = PictureFilter.fit(zip(pictures.split(4), targets.split(4), strict=True))
    rows, wanted = [], []
    for picture, target in zip(torch.nn.functional.pad(pictures, (1, 1, 1, 1)).numpy(), targets.numpy(), strict=True):
        for y in range(7):
            for x in range(7):
                rows.append([*picture[y : y + 3, x : x + 3].ravel(), 1.0])
                wanted.append(target[y, x])
    expected, *_ = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)
    np.testing.assert_allclose(found.weights.numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(found(pictures).numpy().ravel(), np.array(rows) @ expected, atol=1e-10)
    shifted = torch.nn.functional.pad(pictures, (0, 1))[:, :, 1:]  # every pixel its right neighbour: one of the filters
    exact = PictureFilter.fit([(pictures, shifted)])
    torch.testing.assert_close(exact(pictures), shifted, rtol=0, atol=1e-10)


def test_the_filter_of_black_pictures_is_finite():
    found = PictureFilter.fit([(torch.zeros(2, 5, 5), torch.ones(2, 5, 5))])
    torch.testing.assert_close(found(torch.zeros(1, 5, 5)), torch.ones(1, 5, 5))


def test_inrs_fitted_to_targets_are_those_of_a_set_of_such_images():
    """From the starts of the test INRs, so that those of an edit that changes nothing are the test INRs."""
    pictures = loaded(transfer=CLOTHES)
    originals = {split: task.images_of(data)["test"] for split, data in (("test", DATA), ("transfer", CLOTHES))}
    draw = task.UNTRAINED["fitted to the target"](
        replace(CONFIG, transfer=CLOTHES), replace(pictures, targets=originals), job()
    )
    for split in originals:
        torch.testing.assert_close(draw(split), siren.render(pictures.sets[split].parameters), rtol=0, atol=1e-5)


def job():
    """Of a run that is not compiled."""
    return Job(stored(CONFIG), DEFAULT, "cpu", 0, False, silent, stored)


@pytest.mark.parametrize("method", list(task.UNTRAINED))
def test_controls_leave_records_like_editors(method):
    config = replace(CONFIG, method=method, transfer=CLOTHES)
    record, other = execute(config), execute(replace(CONFIG, transfer=CLOTHES))
    expected = {"test_mse", "test_errors", "transfer_mse", "transfer_errors", "example_rows"}
    assert expected < set(record["metrics"]) < set(other["metrics"])
    assert record["data"] == other["data"]
    assert execute(config) == record


def test_several_networks_are_drawn_as_their_mean():
    state = siren.unflatten(siren.initialize(range(3)))
    editor = task.build_editor("NG-GNN", networks=2).eval()
    editor.fit_normalization(WIRING.graph(state))
    edited = editor(WIRING.graph(state)).state_dict()
    pictures = [siren.render({name: values[k] for name, values in edited.items()}) for k in range(2)]
    assert (pictures[0] - pictures[1]).abs().max() > 0
    torch.testing.assert_close(task.rendered(editor, state), (pictures[0] + pictures[1]) / 2)


def test_examples_survive_as_text():
    images = torch.rand(4, 28, 28)
    torch.testing.assert_close(
        editing_pictures.decode(editing_pictures.encode(images)), images, rtol=0, atol=0.5 / 255 + 1e-6
    )


# Runs


def test_a_run_is_stored_with_its_transfer_and_found_again(monkeypatch):
    config = replace(CONFIG, transfer=CLOTHES)
    record = execute(config)
    metrics = record["metrics"]
    assert metrics["transfer_mse"] == pytest.approx(np.mean(metrics["transfer_errors"]), rel=1e-3)
    assert metrics["transfer_mse"] != metrics["test_mse"]
    assert len(metrics["transfer_errors"]) == CLOTHES.test
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    assert execute(config) == record


def test_edits_networks_and_methods_make_other_runs():
    fields = {"edit": "erosion", "networks": 2, "method": "NFN_NP", "transfer": CLOTHES, "seed": 1, "recipe": "own"}
    configs = [CONFIG, *(replace(CONFIG, **{name: value}) for name, value in fields.items())]
    assert len({stored(config).directory for config in configs}) == len(configs)


def test_a_run_that_diverges_is_named_and_its_last_checkpoint_stays():
    class StopError(Exception):
        pass

    def stop(epoch, scores):
        raise StopError

    config = replace(CONFIG, schedule=replace(CONFIG.schedule, learning_rate=1e30, warmup=4, epochs=3))
    with pytest.raises(StopError):  # the first epoch alone, before the rate has done its harm
        execute(replace(config, schedule=replace(config.schedule, learning_rate=1e-3)), report=stop)
    run, healthy = stored(config), stored(replace(config, schedule=replace(config.schedule, learning_rate=1e-3)))
    run.directory.mkdir(parents=True)
    (healthy.directory / "checkpoint.pt").rename(run.directory / "checkpoint.pt")
    before = (run.directory / "checkpoint.pt").read_bytes()
    with pytest.raises(DivergedError, match=rf"{run.directory.name} diverged in epoch 1.*'method': 'DWSNet'"):
        execute(config)
    assert (run.directory / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_with_nan_is_refused_and_stays():
    def stop(epoch, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(CONFIG, report=stop)
    path = stored(CONFIG).directory / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["edge_scale"][1] = torch.nan
    torch.save(state, path)
    with pytest.raises(RunError, match=r"checkpoint\.pt: edge_scale holds NaN"):
        execute(CONFIG)
    assert path.exists()


def test_a_last_step_that_spoils_the_weights_is_seen():
    """Its loss was finite, and it is the only one."""
    schedule = replace(CONFIG.schedule, epochs=1, batch=DATA.train, warmup=0, learning_rate=1e38)
    config = replace(CONFIG, schedule=schedule)
    with pytest.raises(DivergedError, match=r"diverged in epoch 0 \(not finite: (?!train_loss)"):
        execute(config)
    assert not stored(config).directory.exists()


def test_rows_say_what_differs():
    entries = [
        {"methods": ["no edit", "NFN_NP"], "seeds": [0, 1]},
        {"methods": ["NG-T"], "probes": [0, 64], "epochs": 6, "networks": 8},
        {"methods": ["NG-T"], "recipe": "linear inputs", "sigma": None, "edit": "rotation"},
    ]
    base = DATA, CLOTHES, CONFIG.schedule
    configs = [task.row_config(row, *base, dropout={"NG-T": 0.1}) for row in rows_of(entries)]
    assert [(c.method, c.probes, c.seed) for c in configs] == [
        *(("no edit", 0, 0), ("no edit", 0, 1), ("NFN_NP", 0, 0), ("NFN_NP", 0, 1)),
        *(("NG-T", 0, 0), ("NG-T", 64, 0), ("NG-T", 0, 0)),
    ]
    first, several, linear = configs[0], configs[5], configs[6]
    assert (first.options, first.schedule, first.transfer) == ((), CONFIG.schedule, CLOTHES)
    assert (first.edit, first.networks, first.recipe) == ("dilation", 1, "paper")
    assert (several.networks, several.schedule) == (8, replace(CONFIG.schedule, epochs=6))
    assert several.options == (("dropout", 0.1),)
    assert (linear.recipe, linear.edit) == ("linear inputs", "rotation")
    assert dict(linear.options) == {"dropout": 0.1, "sigma": None}
    editor = task.build_editor("NG-T", **dict(linear.options))
    assert sum(p.numel() for p in editor.parameters()) < sum(p.numel() for p in task.build_editor("NG-T").parameters())


def test_pictures_of_runs_show_the_same_examples_with_their_errors():
    records = [execute(replace(CONFIG, method=method)) for method in ("NFN_NP", "no edit", "DWSNet")]
    shown = editing_tables.examples(records)
    assert list(shown) == ["target", "no edit", "DWSNet", "NFN_NP"]
    inrs = load_data(DATA, "cpu")[0]["test"]
    rows = editing_pictures.example_rows(inrs.labels)
    target, drawn = task.targets_of(DATA, "dilation", "cpu")["test"][rows], siren.render(inrs.parameters)[rows]
    torch.testing.assert_close(shown["target"][0], target, rtol=0, atol=0.5 / 255 + 1e-6)
    torch.testing.assert_close(shown["no edit"][0], drawn.clamp(0, 1), rtol=0, atol=0.5 / 255 + 1e-6)
    assert shown["target"][1] is None
    np.testing.assert_allclose(shown["no edit"][1], 100 * ((drawn - target) ** 2).mean((1, 2)), rtol=1e-3)


# Tables


def scored(method, errors, probes=0, seed=0, **metrics):
    config = {"dataset": "mnist", "method": method, "probes": probes, "seed": seed, "recipe": "paper"}
    return {
        "config": config,
        "data": "d",
        "metrics": {"test_mse": float(np.mean(errors)), "test_errors": list(errors), **metrics},
    }


def test_controls_are_never_best_and_do_not_keep_an_editor_from_it():
    base = np.random.default_rng(0).uniform(0.02, 0.04, 200)
    records = [
        scored("3x3 filter", base - 0.02),
        scored("no edit", base + 0.05),
        scored("DWSNet", base),
        scored("NG-GNN", base - 0.01, probes=64),
    ]
    table = editing_tables.error_table(records).set_index("method")
    assert table.index.tolist() == ["no edit", "3x3 filter", "DWSNet", "NG-GNN"]
    assert table.index[table["best"]].tolist() == ["NG-GNN"]
    assert table.loc["DWSNet", "mean"] == pytest.approx(100 * base.mean())
    assert table.loc["DWSNet", "low"] < 100 * base.mean() < table.loc["DWSNet", "high"]
    tied = editing_tables.error_table([*records, scored("NG-T", base - 0.01)])
    assert not tied["best"].any()


def test_editors_are_held_against_controls_inr_by_inr():
    base = np.random.default_rng(0).uniform(0.02, 0.04, 50)
    records = [scored("constant edit", base), scored("DWSNet", base - 0.01), scored("NFN_HNP", base + 0.01)]
    table = editing_tables.against(records, ["constant edit"])
    assert table["method"].tolist() == ["DWSNet", "NFN_HNP"]
    np.testing.assert_allclose(table[["difference", "low", "high"]], [[1, 1, 1], [-1, -1, -1]], atol=1e-9)


def test_rows_that_are_trained_otherwise_stand_beside_no_number_of_the_paper():
    records = [scored("NG-T", [0.1]), scored("NG-T", [0.1]), scored("NFN_HNP", [0.1])]
    records[1]["config"]["recipe"] = "linear inputs"
    table = editing_tables.beside_paper(editing_tables.error_table(records)).set_index(["method", "recipe"])
    assert table["paper_mean"].dropna().to_dict() == {("NG-T", "paper"): 1.96, ("NFN_HNP", "paper"): 2.55}


def test_pictures_carry_their_errors():
    pictures = torch.rand(2, 3, 3)
    fig = editing_tables.picture_errors({"target": (pictures, None), "no edit": (pictures, [1.26, 30])})
    assert [ax.get_xlabel() for ax in fig.axes] == ["", "", "1.3", "30.0"]
    plt.close(fig)


def test_one_of_each_is_the_best_on_validation():
    records = [
        scored("NG-T", [0.1], probes=0, val_score=[-0.3, -0.2]),
        scored("NG-T", [0.1], probes=64, val_score=[-0.3, -0.1]),
        scored("NG-T", [0.1], probes=64, seed=1, val_score=[0.0]),
        scored("no edit", [0.1]),
    ]
    assert editing_tables.one_of_each(records) == [records[3], records[1]]


def test_rendering_keeps_its_digits_under_autocast():
    state = siren.unflatten(siren.initialize(range(3)))
    expected = siren.render(state)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(siren.render(state), expected, rtol=0, atol=0)


# What can't be built


def test_unknown_edits_and_methods_are_named():
    with pytest.raises(ValueError, match=r"unknown edit 'blur'; there are dilation, erosion, rotation"):
        execute(replace(CONFIG, edit="blur"))
    with pytest.raises(ValueError, match=r"unknown method 'MLP'; there are no edit"):
        task.build_editor("MLP")
    with pytest.raises(ValueError, match="DWSNet takes no probe features"):
        task.build_editor("DWSNet", probes=4)


def test_more_inrs_than_images_are_refused():
    with pytest.raises(ValueError, match=r"80,?008"):
        execute(replace(CONFIG, data=replace(DATA, train=80_000)))
