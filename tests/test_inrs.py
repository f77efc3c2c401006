"""Fitting INRs: against one network at a time with autograd and torch's Adam; storing; resuming; augmenting."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from ngcore.data.inrs import sets as inrs
from ngcore.data.inrs import siren
from ngcore.data.inrs.augment import Augmentation, rotation
from ngcore.data.inrs.sets import INRSet, Recipe, fit_set, layer_statistics
from ngcore.data.inrs.siren import Siren
from ngcore.reference.inr import fit_one

RECIPE = Recipe("mnist", "test", steps=3, learning_rate=1e-3)


def smooth_images(count: int) -> torch.Tensor:
    """Images that a SIREN fits to 40 dB within some hundred steps."""
    x, y = siren.pixel_coordinates()
    phases = torch.arange(count).unsqueeze(1)
    return (0.5 + 0.3 * torch.sin(x + phases) * torch.cos(y)).unflatten(1, (28, 28))


def test_initialization_is_the_published_one():
    parameters = siren.unflatten(siren.initialize(range(200)))
    for i, fan_in in enumerate([2, 32]):
        bound = (6 / fan_in) ** 0.5 / 30
        weight = parameters[f"layers.{i}.weight"]
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert (parameters[f"layers.{i}.bias"] == 0).all()
    for kind in ("weight", "bias"):
        values = parameters[f"layers.2.{kind}"]
        assert values.abs().max() <= 32**-0.5
        assert values.std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)


def test_initial_networks_do_not_depend_on_their_batch():
    whole = siren.initialize(range(4))
    assert torch.equal(whole[2:3], siren.initialize([2]))


def test_every_image_starts_from_its_own_network():
    index = torch.arange(50)
    recipes = [replace(RECIPE, split=split, seed=seed) for split in ("train", "test") for seed in (0, 1)]
    starts = torch.cat([siren.initialize(recipe.initial_seeds(index)) for recipe in recipes])
    assert len(starts[:, :64].unique(dim=0)) == 200


def test_fit_agrees_with_one_network_at_a_time_in_float64():
    images = smooth_images(3).double()
    initial = siren.initialize(range(3)).double()
    fit = siren.fit_sirens(images, initial, steps=40, learning_rate=1e-3)
    for i in range(3):
        start = {name: values[i] for name, values in siren.unflatten(initial).items()}
        for name, values in fit_one(images[i], 40, 1e-3, start).items():
            torch.testing.assert_close(fit.parameters[name][i], values, rtol=0, atol=1e-9)


def loss_by_autograd(architecture, flat, target, points):
    """Mean squared error of one network, written anew."""
    parameters = architecture.unflatten(flat.unsqueeze(0))
    x, depth = points, len(architecture.sizes) - 1
    for i in range(depth):
        x = x @ parameters[f"layers.{i}.weight"][0].T + parameters[f"layers.{i}.bias"][0]
        x = torch.sin(architecture.omega * x) if i < depth - 1 else x + 0.5
    return ((x.T - target) ** 2).mean()


ARCHITECTURES = [
    Siren((2, 7, 1), 30.0),
    Siren((2, 5, 6, 4, 1), 10.0),
    Siren((3, 6, 5, 1), 20.0),
    Siren((1, 4, 4, 1), 5.0),
    Siren((2, 8, 8, 3), 30.0),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_gradients_of_any_architecture_agree_with_autograd(architecture):
    axes, values = architecture.sizes[0], architecture.sizes[-1]
    flat, coordinates = architecture.initialize(range(3)).double(), siren.pixel_coordinates(4, axes).double()
    target = torch.rand(3, values, 4**axes, dtype=torch.float64)
    gradient, mse = architecture._gradient(flat, target, coordinates)
    for i in range(3):
        single = flat[i].clone().requires_grad_()
        loss = loss_by_autograd(architecture, single, target[i], coordinates.T)
        torch.testing.assert_close(mse[i], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient[i], torch.autograd.grad(loss, single)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_any_architecture_fits_what_it_renders(architecture):
    images = architecture.render(architecture.unflatten(architecture.initialize([7])), side=6)
    shape = (1, *([3] if architecture.sizes[-1] == 3 else []), *(architecture.sizes[0] * (6,)))
    assert images.shape == shape
    start = architecture.initialize([8])
    before, after = (architecture.fit(images, start, steps=n, learning_rate=1e-3).psnr.item() for n in (1, 60))
    assert after > before + 1


def test_volumes_are_rendered_in_the_order_of_their_memory():
    x, y, z = siren.pixel_coordinates(3, 3).unflatten(1, (3, 3, 3))
    assert x[1, 2].tolist() == y[1, :, 2].tolist() == z[:, 1, 2].tolist() == [-1, 0, 1]


def test_a_siren_without_a_sine_layer_is_an_error():
    with pytest.raises(ValueError, match=r"at least one sine layer .* \(2, 1\)"):
        Siren((2, 1), 30.0)


def test_each_fit_stops_at_40_db():
    images = torch.stack([torch.full((28, 28), 0.5), smooth_images(1)[0]]).double()
    initial = siren.initialize(range(2)).double()
    siren.unflatten(initial)["layers.2.weight"][0] *= 1e-4  # the first starts as a nearly grey image, above 40 dB
    siren.unflatten(initial)["layers.2.bias"][0] *= 1e-4
    fit = siren.fit_sirens(images, initial, steps=10, learning_rate=1e-3)
    start = siren.unflatten(initial)
    for name, values in fit.parameters.items():
        assert torch.equal(values[0], start[name][0])
        assert not torch.equal(values[1], start[name][1])


def test_renderings_are_in_the_images_order():
    """x grows to the right and y downwards, as numpy.meshgrid lays them out."""
    x, y = siren.pixel_coordinates(3)
    assert x.tolist() == [-1, 0, 1] * 3
    assert y.tolist() == [-1, -1, -1, 0, 0, 0, 1, 1, 1]


def test_a_diverging_fit_is_an_error():
    with pytest.raises(FloatingPointError, match=r"INR 0 .* learning rate inf"):
        siren.fit_sirens(smooth_images(1), siren.initialize([0]), steps=2, learning_rate=float("inf"))


def test_a_set_is_stored_and_extended(tmp_path, monkeypatch):
    monkeypatch.setattr(inrs, "SHARD", 8)
    small = fit_set(RECIPE, 8, tmp_path)
    monkeypatch.setattr(siren, "fit_sirens", lambda *_, **__: pytest.fail("fitted again"))
    again = fit_set(RECIPE, 8, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(inrs, "SHARD", 8)
    large = fit_set(RECIPE, 20, tmp_path)
    assert len(large) == 20
    assert large.index.tolist() == list(range(20))
    for name in siren.SHAPES:
        assert torch.equal(small.parameters[name], again.parameters[name])
        assert torch.equal(small.parameters[name], large.parameters[name][:8])


def test_workers_fit_the_same_networks(tmp_path):
    alone = fit_set(RECIPE, 20, tmp_path / "alone")
    shared = fit_set(RECIPE, 20, tmp_path / "shared", workers=2)
    for name in siren.SHAPES:
        torch.testing.assert_close(alone.parameters[name], shared.parameters[name], rtol=1e-5, atol=1e-6)


def test_a_stopped_fit_leaves_whole_shards_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(inrs, "SHARD", 8)
    calls = []

    def fit_then_fail(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    original = siren.fit_sirens
    monkeypatch.setattr(siren, "fit_sirens", fit_then_fail)
    with pytest.raises(KeyboardInterrupt):
        fit_set(RECIPE, 24, tmp_path)
    written = sorted(path.name for path in (tmp_path / "inrs" / RECIPE.name).iterdir())
    assert written == ["000000_000007.safetensors", "000008_000015.safetensors"]  # of the first program's 16 INRs


@pytest.mark.parametrize("damage", ["truncated", "nan", "shape", "missing", "labels", "lengths"])
def test_a_damaged_shard_is_named(damage, tmp_path):
    fit_set(RECIPE, 4, tmp_path)
    (path,) = (tmp_path / "inrs" / RECIPE.name).iterdir()
    tensors = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "nan":
        tensors["layers.1.bias"][2, 3] = float("nan")
        save_file(tensors, path)
    elif damage == "shape":
        tensors["layers.1.bias"] = tensors["layers.1.bias"][:, :5].contiguous()
        save_file(tensors, path)
    elif damage == "labels":
        tensors["labels"] = tensors["labels"].flip(0).contiguous()
        save_file(tensors, path)
    elif damage == "lengths":
        tensors["psnr"] = tensors["psnr"][1:].contiguous()
        save_file(tensors, path)
    else:
        del tensors["psnr"]
        save_file(tensors, path)
    with pytest.raises(ValueError, match=RECIPE.name if damage == "labels" else path.name):
        fit_set(RECIPE, 4, tmp_path)


def test_statistics_are_of_all_parameters_of_a_layer():
    parameters = siren.unflatten(torch.randn(5, siren.INR.num_parameters))
    found = layer_statistics(INRSet(parameters, torch.zeros(5).long(), torch.arange(5), torch.zeros(5)))
    assert [name for name, _, _ in found] == list(siren.SHAPES)
    name, mean, std = found[2]
    values = parameters[name].flatten().tolist()
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert std == pytest.approx((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5, rel=1e-4)


def test_augmentation_moves_the_image():
    """What an augmented INR renders at x is what the INR renders at zoom · R x + shift."""
    torch.manual_seed(0)
    parameters = siren.unflatten(siren.initialize(range(3)).double())
    torch.manual_seed(5)
    changed = Augmentation(weight_dropout=0.0)(parameters)
    torch.manual_seed(5)  # the same draws, in the same order
    zoom = 1 + 0.2 * (torch.rand(3, 1, 1, dtype=torch.float64) * 2 - 1)
    turn = rotation(torch.deg2rad(45.0 * (torch.rand(3, dtype=torch.float64) * 2 - 1)))
    shift = 0.25 * (torch.rand(3, 2, 1, dtype=torch.float64) * 2 - 1)
    coordinates = siren.pixel_coordinates().double()
    moved = zoom * turn @ coordinates + shift
    weight, bias = parameters["layers.0.weight"], parameters["layers.0.bias"].unsqueeze(-1)
    expected = torch.sin(30 * (weight @ moved + bias))
    found = torch.sin(30 * (changed["layers.0.weight"] @ coordinates + changed["layers.0.bias"].unsqueeze(-1)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for name in list(siren.SHAPES)[2:]:
        assert torch.equal(changed[name], parameters[name])


def test_rotations_are_orthogonal_and_turn_by_their_angle():
    angle = torch.linspace(-3, 3, 7, dtype=torch.float64)
    matrices = rotation(angle)
    eye = torch.eye(2, dtype=torch.float64).expand(7, 2, 2)
    torch.testing.assert_close(matrices @ matrices.transpose(1, 2), eye)
    turned = matrices @ torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(torch.atan2(turned[:, 1], turned[:, 0]), angle)


def test_weight_dropout_zeroes_its_share_and_no_bias():
    torch.manual_seed(0)
    parameters = {name: torch.ones(500, *shape) for name, shape in siren.SHAPES.items()}
    changed = Augmentation(0.0, 0.0, 0.0, weight_dropout=0.1)(parameters)
    assert (changed["layers.1.weight"] == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert all((changed[name] == 1).all() for name in siren.SHAPES if name.endswith("bias"))
    assert all((values == 1).all() for values in parameters.values())  # the input is left alone


def test_shards_fitted_together_are_those_fitted_one_by_one(tmp_path, monkeypatch):
    """As on a GPU: one tensor program fits several shards, the last of which is short, but for those that are there."""
    monkeypatch.setattr(inrs, "SHARD", 4)
    whole = {}
    for name, batch in (("alone", 2), ("together", 8)):
        monkeypatch.setitem(inrs.BATCH, "cpu", batch)
        if name == "together":
            directory = tmp_path / name / "inrs" / RECIPE.name
            directory.mkdir(parents=True)
            middle = tmp_path / "alone" / "inrs" / RECIPE.name / "000004_000007.safetensors"
            save_file(load_file(middle), directory / middle.name)
        whole[name] = fit_set(RECIPE, 14, tmp_path / name)
    files = [{path.name for path in (tmp_path / name / "inrs" / RECIPE.name).iterdir()} for name in whole]
    assert files[0] == files[1] == {f"{a:06d}_{b:06d}.safetensors" for a, b in ((0, 3), (4, 7), (8, 11), (12, 13))}
    for name, values in whole["alone"].parameters.items():
        torch.testing.assert_close(whole["together"].parameters[name], values, rtol=0, atol=1e-6)
    assert torch.equal(whole["together"].labels, whole["alone"].labels)


class Copies(TorchFunctionMode):
    """Counts what would be copied to a GPU, which waits for it."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.to)
        return func(*args, **(kwargs or {}))


def test_no_step_of_a_fit_brings_anything_to_the_device():
    counts = []
    for steps in (3, 9):
        with Copies() as copies:
            siren.fit_sirens(smooth_images(2), siren.initialize(range(2)), steps=steps, learning_rate=1e-3)
        counts.append(copies.count)
    assert counts[0] == counts[1] > 0
