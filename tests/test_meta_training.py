"""Meta-training: its gradient against finite differences, resuming, tasks, runs."""

import dataclasses
import math
import runpy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ngcore.models.optimizers import METHODS, Layout, LearnedOptimizer
from ngcore.models.optimizers.files import provenance, save, shipped
from ngcore.models.optimizers.meta import Learner, MetaTraining, meta_backward, unroll
from ngcore.models.optimizers.problem import FIRST_SEED, Task, train_network
from ngcore.study.runs import ROOT, RunError, StoredRun, identity, results_directory, write_record
from ngcore.tasks import execute, learning_to_optimize, meta_training, optimizer_cost
from ngcore.tasks.meta_training import Config
from ngcore.tasks.optimization import ImageTask, task_cnn

TINY = ImageTask("fashion_mnist", (3, 4, 3), train_images=64, validation_images=32, test_images=32, batch=8)
each_method = pytest.mark.parametrize("method", METHODS)


def tiny_task():
    """Two classes of points, and a network that is no CNN, in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    labels = (inputs[:, 0] > 0).long()

    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    return Task(build, inputs, labels, inputs, labels, batch=10)


def tiny_images():
    images = torch.randn(20, 1, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(20) % 10
    return Task(lambda: task_cnn(1, (2, 3, 2), "tanh").double(), images, labels, images, labels, batch=10)


def config_of(method, **changes):
    fields = {"outer_steps": 4, "inner_steps": 3, "horizon": 6, "validate_every": 2, "validation_steps": 4}
    return Config("fashion_mnist", method, 0, TINY, **fields | changes)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path))


@pytest.mark.parametrize("method", ["FF", "LSTM", "NFN", "NG-GNN", "NG-T"])
def test_meta_gradient_is_the_finite_difference(method):
    """Of the mean loss of an unroll, as the rule's weights change, along a random direction and along coordinates.

    The rule reads what it read in the unroll, however its weights change: so the module defines the gradient. The
    losses are the unroll's own at the weights that it ran with.
    """
    task = tiny_task() if method != "NFN" else tiny_images()  # NFN reads chains of convolutions
    torch.manual_seed(2)
    rule = LearnedOptimizer(method).double()
    network = task.network(0)
    start = [p.detach().clone() for p in network.parameters()]
    learner = Learner(network, rule.bind(network, task.example), 0)
    steps = 5
    with torch.no_grad():
        for parameter in rule.network[-1].parameters():
            parameter += 30  # changes of a size that moves the loss
    features, gradients, losses = unroll(task, learner, steps, torch.Generator().manual_seed(7))
    layout = learner.optimizer.layout
    meta_backward(rule, layout, features, gradients, chunk=2)
    found = torch.cat([p.grad.flatten() for p in rule.parameters()])

    @torch.no_grad()
    def mean_loss():
        """Of the same batches, the weights moved by what the rule makes of the recorded inputs."""
        generator = torch.Generator().manual_seed(7)
        weights, total = layout.flatten(start), 0.0
        for t in range(steps):
            rows = torch.randint(len(task.labels), (task.batch,), generator=generator)
            state = dict(zip(layout.shapes, layout.split(weights), strict=True))
            total += task.loss(torch.func.functional_call(network, state, task.inputs[rows]), task.labels[rows]).item()
            weights = weights + rule(features[t : t + 1], layout)[0]
        return total / steps

    assert mean_loss() == pytest.approx(losses.mean().item(), abs=1e-12)
    own = [p.data for p in rule.parameters()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in own]
        pair = []
        for sign in (1, -1):
            torch._foreach_add_(own, direction, alpha=sign * 1e-7)
            pair.append(mean_loss())
            torch._foreach_add_(own, direction, alpha=-sign * 1e-7)
        expected = (pair[0] - pair[1]) / 2e-7
        assert abs(expected) > 1e-4
        along = (found * torch.cat([d.flatten() for d in direction])).sum().item()
        assert along == pytest.approx(expected, rel=1e-4)


def test_meta_training_teaches():
    """A few outer steps on the tiny task: later unrolls have lower losses, and new networks learn."""
    task = tiny_task()
    config = dataclasses.replace(config_of("FF"), learning_rate=1e-2, inner_steps=20, horizon=20)
    training = MetaTraining(config.settings, task)
    losses = [training.outer_step(step) for step in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_networks_are_trained_on_in_turns():
    task = TINY.task("validation")
    training = MetaTraining(config_of("FF", networks=2, horizon=12).settings, task)
    assert [learner.age for learner in training.learners] == [0, 6]
    assert training.outer_step(0) == pytest.approx(math.log(10), abs=0.2)
    assert [learner.age for learner in training.learners] == [3, 6]
    first, second = (learner.network for learner in training.learners)
    for step in range(1, 6):  # the second network is at 9, 12 and then given up
        training.outer_step(step)
    assert training.learners[0].network is first
    assert training.learners[1].network is not second
    assert [learner.age for learner in training.learners] == [9, 3]
    assert training.started == 3


@pytest.mark.parametrize(("networks", "horizon"), [(1, 3), (1, 9), (2, 12), (3, 9), (4, 6), (5, 30)])
def test_networks_are_counted(networks, horizon):
    """As many networks are trained as the outer steps have trained."""
    task, trained = TINY.task("validation"), []
    training = MetaTraining(config_of("FF", networks=networks, horizon=horizon).settings, task)
    for step in range(14):
        assert training.settings.networks_seen(step) == len(trained)
        training.outer_step(step)
        own = training.learners[step % networks].network
        trained += [own] * all(own is not other for other in trained)


def test_a_validation_is_the_mean_over_its_networks():
    """Each is trained by itself from a seed of its own; one that diverges counts as 0."""
    training = MetaTraining(config_of("FF", validation_networks=3, validation_steps=5).settings, tiny_task())
    seeds = [FIRST_SEED["validation"] + i for i in range(3)]
    alone = [train_network(training.task, training.bind, seed, 5, (5,))["accuracy"][-1] for seed in seeds]
    assert len(set(alone)) > 1
    assert training.validate() == pytest.approx(sum(alone) / 3)


def test_the_outer_rate_falls_along_half_a_cosine():
    training = MetaTraining(config_of("FF", decay_steps=4, learning_rate=0.02).settings, TINY.task("validation"))
    before = [p.clone() for p in training.rule.parameters()]
    rates, moved = [], []
    for step in range(5):
        training.outer_step(step)
        rates.append(training.outer.param_groups[0]["lr"])
        moved.append(
            max((p - old).abs().max().item() for p, old in zip(training.rule.parameters(), before, strict=True))
        )
        before = [p.detach().clone() for p in training.rule.parameters()]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.02, 0.01 * (1 + half), 0.01, 0.01 * (1 - half), 0.0])
    assert moved[0] == pytest.approx(0.02, rel=1e-3)  # Adam's first step
    assert moved[4] == 0
    assert config_of("FF").settings.rate(10**6) == config_of("FF").learning_rate


def test_a_run_of_one_validation_network_has_its_old_name():
    """Fields that are newer than stored runs stand in a name only where they are used."""
    assert not {"validation_networks", "decay_steps"} & identity(config_of("FF")).keys()
    assert identity(config_of("FF", decay_steps=4))["decay_steps"] == 4


@each_method
def test_an_interrupted_run_ends_as_if_it_was_not(method, monkeypatch, tmp_path):
    """Stopped after every outer step once: the same weights, losses and scores, bit for bit."""
    monkeypatch.setattr(meta_training, "CHECKPOINT_EVERY", 1)
    config = config_of(method, decay_steps=4, validation_networks=2)
    expected = execute(config)
    place = StoredRun.of(config, TINY.task("validation").digest, tmp_path)
    weights = place.weights()
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "again"))

    class Stopped(Exception):
        pass

    def stop(step, scores):
        raise Stopped

    for _ in range(config.outer_steps):
        with pytest.raises(Stopped):
            execute(config, report=stop)
    found = execute(config)
    assert found["metrics"] == expected["metrics"]
    assert len(found["metrics"]["meta_loss"]) == 4
    assert found["metrics"]["validated"] == [2, 4]
    again = StoredRun.of(config, TINY.task("validation").digest, tmp_path / "again").weights()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert execute(config) == found


def test_runs_are_stored_and_name_what_is_missing(tmp_path):
    record = execute(config_of("FF"))
    (config,) = learning_to_optimize.configs_of(
        ["FF"], {"none": TINY}, 1, {"FF": record["hash"]}, 1e-3, steps=5, curve_every=2, curve_images=8
    )
    found = execute(config)
    assert found["metrics"]["measured"] == [0, 2, 4, 5]
    assert len(found["metrics"]["train_loss"]) == 5
    assert found["metrics"]["final_accuracy"] == found["metrics"]["accuracy"][-1]
    assert execute(config) == found
    about = {name: found["metrics"][name] for name in ("outer_steps", "meta_seed", "horizon")}
    assert about == {"outer_steps": record["metrics"]["best_step"], "meta_seed": 0, "horizon": 6}
    assert found["metrics"]["networks_seen"] == record["metrics"]["best_step"] / 2  # each has two outer steps
    with pytest.raises(RunError, match=r"is the meta-training of FF, not of LSTM"):
        execute(dataclasses.replace(config, method="LSTM"))
    with pytest.raises(RunError, match=r"holds no finished meta-training"):
        execute(dataclasses.replace(config, weights="0" * 16))
    (tmp_path / "runs" / found["hash"] / "weights.safetensors").touch()
    with pytest.raises(RunError, match=r"is a run of learning_to_optimize"):
        meta_training.trained(found["hash"])


def test_the_best_run_of_every_method_is_shipped(tmp_path, monkeypatch):
    """Of two meta-seeds the one with the better validation, with its provenance."""
    monkeypatch.setattr("ngcore.models.optimizers.files.OPTIMIZERS", tmp_path / "shipped")
    monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path / "output"))
    records = [execute(dataclasses.replace(config_of("FF", learning_rate=0.1), seed=seed)) for seed in range(3)]
    for record in records:  # as they would be from committed code
        write_record(record, results_directory("p") / f"{record['hash']}.json")
    script = runpy.run_path(str(ROOT / "data" / "make" / "optimizers.py"))
    script["main"].__globals__["OPTIMIZERS"] = tmp_path / "shipped"
    script["main"](["--profile", "p"])
    scores = [max(record["metrics"]["val_score"]) for record in records]
    assert len(set(scores)) > 1
    best = records[scores.index(max(scores))]
    assert provenance("FF")["run"] == best["hash"]
    expected, _ = meta_training.trained(best["hash"])
    for name, weights in shipped("FF").state_dict().items():
        assert torch.equal(weights, expected.state_dict()[name])


def test_scores_of_more_networks_count_for_more():
    def record(method, networks, scores):
        config = {"method": method} | ({} if networks == 1 else {"validation_networks": networks})
        return {"config": config, "metrics": {"val_score": scores}}

    lucky, sure, surer = record("FF", 1, [0.9]), record("FF", 4, [0.7, 0.8, 0.6]), record("FF", 4, [0.5, 0.79])
    other = record("LSTM", 1, [0.1])
    assert meta_training.best_runs([other, lucky, surer, sure]) == [sure, other]


def test_a_shipped_optimizer_is_part_of_a_runs_data(tmp_path, monkeypatch):
    """Other weights under the same name are another run."""
    monkeypatch.setattr("ngcore.models.optimizers.files.OPTIMIZERS", tmp_path / "shipped")
    (config,) = learning_to_optimize.configs_of(
        ["FF"], {"none": TINY}, 1, {"FF": "shipped"}, 1e-3, steps=2, curve_every=2, curve_images=8
    )
    with pytest.raises(FileNotFoundError, match=r"FF\.safetensors is missing"):
        execute(config)
    hashes = set()
    for _ in range(2):
        origin = dataclasses.asdict(Config("fashion_mnist", "FF", 0, TINY, 10)) | {"best_step": 7}
        save(LearnedOptimizer("FF"), tmp_path / "shipped" / "FF.safetensors", origin)
        hashes.add(execute(config)["hash"])
    assert len(hashes) == 2


def test_all_methods_train_on_the_same_batches():
    """Adam and a rule that changes nothing see the same first loss; networks of other seeds do not."""
    task = TINY.task()

    def losses(seed, **options):
        found = train_network(task, lambda network: torch.optim.Adam(network.parameters(), **options), seed, 3, (3,))
        return found["train_loss"]

    still, moved, other = losses(0, lr=0.0), losses(0, lr=0.1), losses(1, lr=0.0)
    assert still[0] == moved[0] != other[0]
    assert still[1] != moved[1]


def test_tuning_takes_the_rate_with_the_best_mean():
    configs = learning_to_optimize.tuning_configs("Adam", TINY, [1e-3, 1e-2], 2, steps=3)
    assert [(c.learning_rate, c.seed, c.held) for c in configs] == [
        (1e-3, 0, "validation"),
        (1e-3, 1, "validation"),
        (1e-2, 0, "validation"),
        (1e-2, 1, "validation"),
    ]
    records = [
        {"config": {"learning_rate": c.learning_rate}, "metrics": {"final_accuracy": score}}
        for c, score in zip(configs, [0.9, 0.1, 0.6, 0.6], strict=True)
    ]
    assert learning_to_optimize.best_learning_rate(records) == 1e-2
    assert execute(configs[0])["metrics"]["final_accuracy"] <= 1


def test_divergence_is_told():
    """In meta-training and at the first step of training."""
    task = dataclasses.replace(TINY.task(), loss=lambda outputs, labels: F.cross_entropy(outputs, labels) * math.inf)
    with pytest.raises(FloatingPointError, match=r"outer step 0 of FF: the gradient of layers\.0\.weight.* not finite"):
        MetaTraining(config_of("FF").settings, task).outer_step(0)
    with pytest.raises(FloatingPointError, match="step 0: the loss is inf"):
        train_network(task, lambda network: torch.optim.SGD(network.parameters(), 0.1), 0, 2, (2,))


def test_a_gradient_of_the_optimizer_that_is_not_finite_is_told():
    training = MetaTraining(config_of("FF").settings, TINY.task("validation"))
    before = {name: values.clone() for name, values in training.rule.state_dict().items()}
    next(training.rule.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match=r"outer step 0 of FF: the gradient of its own weights is not finite"):
        training.outer_step(0)
    assert all(torch.equal(before[name], values) for name, values in training.rule.state_dict().items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, "learned"])
def test_a_network_that_diverges_is_left_as_it_is(optimizer):
    """The run says where, and its curves keep their lengths; a validation of such an optimizer counts as 0."""
    training = MetaTraining(config_of("FF").settings, TINY.task("validation"))
    with torch.no_grad():
        training.rule.network[-1].bias.fill_(1e30)

    def optimize(network):
        if optimizer == "learned":
            return training.rule.bind(network)
        return optimizer(network.parameters(), lr=1e30)

    found = train_network(training.task, optimize, 0, 9, (0, 3, 9))
    assert found["diverged_at"] in (1, 2, 3)
    assert len(found["train_loss"]) == 9
    assert len(found["accuracy"]) == 3
    assert all(map(math.isfinite, found["train_loss"]))
    assert len(set(found["train_loss"][found["diverged_at"] :])) == 1
    assert training.validate() == 0


def test_networks_that_are_measured_are_no_others():
    """Test, validation and meta-training draw networks of seeds of their own."""
    task, drawn = TINY.task("validation"), []
    spy = dataclasses.replace(task)
    object.__setattr__(spy, "network", lambda seed: (drawn.append(seed), task.network(seed))[1])
    training = MetaTraining(config_of("FF").settings, spy)
    for step in range(3):
        training.outer_step(step)
    meta, drawn[:] = set(drawn), []
    training.validate()
    assert len(meta) > 1
    assert len(drawn) == 1
    assert meta.isdisjoint(drawn)
    assert min(FIRST_SEED.values()) > max(meta) + 1000
    assert abs(FIRST_SEED["test"] - FIRST_SEED["validation"]) > 1000


def test_dropout_is_drawn_from_the_seed():
    task = dataclasses.replace(
        tiny_task(), build=lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    )
    losses = []
    for _ in range(2):
        found = train_network(task, lambda network: torch.optim.SGD(network.parameters(), 0.1), 0, 5, (5,))
        losses.append(found["train_loss"])
    assert losses[0] == losses[1]
    runs = []
    for _ in range(2):
        training = MetaTraining(config_of("FF").settings, task)
        runs.append([training.outer_step(step) for step in range(3)])
        torch.rand(3)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "the horizon, 0 steps, is no multiple"),
        ({"dataset": "mnist"}, "dataset 'mnist', but the task is on 'fashion_mnist'"),
        ({"horizon": 7}, "the horizon, 7 steps, is no multiple of 3 inner steps"),
        ({"outer_steps": 0}, "at least one outer step"),
        ({"inner_steps": 1, "horizon": 6}, "two inner steps"),
        ({"validation_networks": 0}, "a validation needs at least one network, got 0"),
    ],
)
def test_meta_training_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config_of("FF"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "SGD"}, "unknown method 'SGD'"),
        ({"weights": None}, "FF: learned optimizers, and no others, have weights"),
        ({"method": "Adam"}, "Adam: learned optimizers, and no others"),
        ({"learning_rate": 0.1}, "FF: hand-designed optimizers, and no others, have a learning rate"),
        ({"steps": 0}, "must be at least 1"),
        ({"dataset": "cifar10"}, "dataset 'cifar10', but the task is on 'fashion_mnist'"),
    ],
)
def test_runs_that_make_no_sense_are_refused(changes, message):
    (config,) = learning_to_optimize.configs_of(
        ["FF"], {"none": TINY}, 1, {"FF": "shipped"}, 1e-3, steps=2, curve_every=2, curve_images=8
    )
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_images_are_standardized_and_apart():
    """Validation images follow those that are trained on; test images are others; both take the training statistics."""
    task, test = TINY.task("validation"), TINY.task("test")
    assert task.inputs.shape == (64, 1, 28, 28)
    assert task.held_inputs.shape == test.held_inputs.shape == (32, 1, 28, 28)
    assert torch.equal(task.inputs, test.inputs)
    assert not torch.equal(task.held_inputs, test.held_inputs)
    std, mean = torch.std_mean(task.inputs)
    assert abs(mean) < 1e-5
    assert std == pytest.approx(1, abs=1e-4)
    longer_task = ImageTask("fashion_mnist", (3,), 96, 0, 1)
    longer = longer_task.task()
    scale = longer.inputs[64:].std() / task.held_inputs.std()
    assert torch.allclose(
        (longer.inputs[64:] - longer.inputs[64:].mean()) / scale, task.held_inputs - task.held_inputs.mean(), atol=1e-4
    )
    with pytest.raises(ValueError, match="held images are for"):
        TINY.task("train")
    with pytest.raises(ValueError, match="the task on fashion_mnist has no validation images"):
        longer_task.task("validation")
    colour = ImageTask("cifar10", (3,), 50, 0, 10).task()
    assert colour.inputs.mean((0, 2, 3)).abs().max() < 1e-5


def test_cost_counts_time_and_memory():
    table = optimizer_cost.cost(TINY.task(), ["Adam", "FF", "NG-GNN"]).set_index("method")
    parameters = Layout.of(TINY.task().network(0)).count
    assert (table[["step_ms", "task_ms", "step_mb"]] > 0).all().all()
    assert table.loc["FF", "state_mb"] == pytest.approx(5 * parameters * 4 / 2**20)
    assert table.loc["Adam", "state_mb"] == pytest.approx(2 * parameters * 4 / 2**20, rel=0.05)
    assert table.loc["NG-GNN", "step_mb"] > table.loc["FF", "step_mb"] > parameters * 14 * 4 / 2**20
    assert optimizer_cost.peak_bytes(lambda: (torch.zeros(1000), torch.zeros(500))) == 6000


def test_what_can_be_read():
    deeper = ImageTask("fashion_mnist", (3, 3, 3, 3), 64, 0, 32).task()
    assert [m for m in learning_to_optimize.METHODS if not learning_to_optimize.can_read(m, deeper)] == ["NFN"]
