"""INR editing: targets against other libraries, the identity check, and runs that fail without losing anything."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch

from ngcore.data.inrs import siren
from ngcore.data.inrs.edits import ANGLE, dilate, erode, rotate
from ngcore.digests import tensor_digest
from ngcore.study import training
from ngcore.study.runs import RunError, StoredRun, cache_directory
from ngcore.study.training import DivergedError, Schedule
from ngcore.tasks import execute
from ngcore.tasks import inr_editing as task
from ngcore.tasks.inr_sets import WIRING, INRData, load_data

DATA = INRData("mnist", train=16, validation=8, test=12, steps=3, learning_rate=1e-3)
CLOTHES = replace(DATA, dataset="fashion_mnist")
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


@pytest.mark.parametrize("method", list(task.METHODS))
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


def test_the_unedited_error_is_that_of_an_editor_without_scales():
    sets, _ = load_data(DATA, "cpu")
    targets = task.targets_of(DATA, "dilation", "cpu")
    editor = task.build_editor("DWSNet").eval()
    problem = task.Editing(editor, sets, targets, None)
    with torch.no_grad():
        editor.node_scale.zero_()
        editor.edge_scale.zero_()
        found = problem.test()
    assert found["test_mse"] == pytest.approx(found["unedited_mse"], rel=1e-6)
    assert found["examples_edited"] == found["examples_unedited"]
    one_by_one = [
        ((siren.render({name: values[i] for name, values in sets["test"].parameters.items()}) - target) ** 2).mean()
        for i, target in enumerate(targets["test"])
    ]
    assert found["unedited_mse"] == pytest.approx(torch.stack(one_by_one).mean().item(), rel=1e-5)


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
    torch.testing.assert_close(task.decode(task.encode(images)), images, rtol=0, atol=0.5 / 255 + 1e-6)


# Runs


def test_a_run_is_stored_with_its_transfer_and_found_again(monkeypatch):
    config = replace(CONFIG, transfer=CLOTHES)
    record = execute(config)
    metrics = record["metrics"]
    clothes = load_data(CLOTHES, "cpu")[0]["test"]
    expected = task.unedited_mse(clothes, task.targets_of(CLOTHES, "dilation", "cpu")["test"])
    assert metrics["transfer_unedited_mse"] == pytest.approx(expected)
    assert metrics["transfer_mse"] != metrics["test_mse"]
    (row,) = task.unedited_records([record])
    assert row["config"]["method"] == "no edit"
    assert row["metrics"]["transfer_mse"] == pytest.approx(expected)
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    assert execute(config) == record


def test_edits_networks_and_methods_make_other_runs():
    fields = {"edit": "erosion", "networks": 2, "method": "NFN_NP", "transfer": CLOTHES, "seed": 1}
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


def test_table_configs_are_the_rows_of_the_table():
    configs = task.table_configs(
        DATA,
        CLOTHES,
        CONFIG.schedule,
        seeds={0: 2, 4: 1, 16: 1, 64: 1},
        dropout={"NG-T": 0.1},
    )
    assert len(configs) == 12 + 6  # a second seed for the rows without probe features
    by_row = {(config.method, config.probes, config.seed): config for config in configs}
    assert {row[:2] for row in by_row} == set(task.ROWS)
    assert by_row["NG-T", 64, 0].options == (("dropout", 0.1),)
    assert by_row["NG-T", 64, 0].schedule == CONFIG.schedule
    assert by_row["NFN_NP", 0, 1].options == ()
    assert {config.transfer for config in configs} == {CLOTHES}


def test_pictures_of_runs_show_the_same_examples():
    first = execute(CONFIG)
    second = execute(replace(CONFIG, method="NFN_NP"))
    pictures = task.example_pictures([first, second])
    assert list(pictures) == ["INR", "target", "DWSNet", "NFN_NP"]
    labels = load_data(DATA, "cpu")[0]["test"].labels
    expected = task.targets_of(DATA, "dilation", "cpu")["test"][task.example_rows(labels)]
    torch.testing.assert_close(pictures["target"], expected, rtol=0, atol=0.5 / 255 + 1e-6)
    assert {picture.shape for picture in pictures.values()} == {expected.shape}


def test_rendering_keeps_its_digits_under_autocast():
    state = siren.unflatten(siren.initialize(range(3)))
    expected = siren.render(state)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(siren.render(state), expected, rtol=0, atol=0)


# What can't be built


def test_unknown_edits_and_methods_are_named():
    with pytest.raises(ValueError, match=r"unknown edit 'blur'; there are dilation, erosion, rotation"):
        execute(replace(CONFIG, edit="blur"))
    with pytest.raises(ValueError, match=r"unknown method 'MLP'; there are DWSNet"):
        task.build_editor("MLP")
    with pytest.raises(ValueError, match="DWSNet takes no probe features"):
        task.build_editor("DWSNet", probes=4)


def test_a_variant_changes_one_row():
    assert task.variant([CONFIG], "DWSNet", 0, networks=4) == replace(CONFIG, networks=4)
    with pytest.raises(ValueError, match="no run of NG-T with 4 probe features"):
        task.variant([CONFIG], "NG-T", 4, networks=4)


def test_more_inrs_than_images_are_refused():
    with pytest.raises(ValueError, match=r"80,?008"):
        execute(replace(CONFIG, data=replace(DATA, train=80_000)))
