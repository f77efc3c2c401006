"""Ablations: every variant differs from the full model, and is what it says; comparisons tell noise from difference."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import permute
from scipy import stats

from ngcore.data.inrs.augment import Augmentation, permuted
from ngcore.data.zoos import wild_park
from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.graph import mlp, trace
from ngcore.graph.collection import Collection
from ngcore.graph.dialects import bias_nodes
from ngcore.graph.forward import activations
from ngcore.graph.frame import Frame
from ngcore.models import NGGNN, NGT, PerParameter, Scores
from ngcore.models.encoder import ProbeFeatures, grid
from ngcore.models.entries import StandardizedEntries
from ngcore.models.messages import DIRECTIONS
from ngcore.reference.encoder import encoding, to_batch
from ngcore.reference.ng_gnn import PlainNGGNN, PNAAggregation
from ngcore.study import comparison, tables
from ngcore.study.runs import identity, make_record, run_hash
from ngcore.study.training import Schedule
from ngcore.tasks import ablations, architectural_noise, execute, generalization, inr_classification, loss_curves, zoos
from ngcore.tasks.inr_classification import Config, build_model
from ngcore.tasks.inr_sets import WIRING, INRData
from ngcore.tasks.rows import rows_of
from ngcore.tasks.variants import changed as changed_config

SMALL_PARK = zoos.Zoo(24, wild_park.Recipe(64, 50, 2, 2))


@pytest.fixture(autouse=True, scope="module")
def shared_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NGCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
        zoos.load.cache_clear()


def random_state(count=3, wiring=WIRING):
    return {n: 0.3 * torch.randn(count, *s, dtype=torch.float64) for n, s in wiring.shapes.items()}


def size(model):
    return sum(p.numel() for p in model.parameters())


INR_VARIANTS = [
    (question, variant, changes)
    for question in ("positional embeddings", "directions", "updates", "normalization", "biases", "probe points")
    for variant, changes in ablations.VARIANTS[question].items()
    if changes
]


@pytest.mark.parametrize(("question", "variant", "changes"), INR_VARIANTS)
@pytest.mark.parametrize("method", ["NG-GNN", "NG-T"])
def test_every_variant_of_a_model_differs_from_the_full_one(method, question, variant, changes):
    if method == "NG-T" and question in ("directions", "updates"):
        with pytest.raises(TypeError, match=r"directions|residual"):
            build_model(method, **changes)
        return
    torch.manual_seed(0)
    state = random_state()
    found = []
    for options in ({}, changes):
        torch.manual_seed(1)
        model = build_model(method, 4, **options).double().eval()
        graph = model.wiring.graph(state)
        model.fit_normalization(graph)
        found.append((size(model), model(graph).detach()))
    (full_size, full), (changed_size, changed) = found
    assert full_size != changed_size or (full - changed).abs().max() > 1e-4


def test_the_questions_about_cnns_differ_too():
    networks = zoos.load((SMALL_PARK,), False)
    rows = torch.arange(4)
    for question in ("activation embeddings", "linear layers"):
        (full,) = generalization.configs_of(
            "cifar10_wild_park", [SMALL_PARK], ["NG-GNN"], 1, Schedule(1, 4), {"NG-GNN": 1e-3}
        )
        found = []
        for trial in ablations.trials(question, [full]):
            torch.manual_seed(1)
            config = trial.config
            model = generalization.build_model(config.method, networks, **dict(config.options)).eval()
            inputs = generalization.METHODS[config.method].inputs(networks)
            model.fit_normalization(inputs, rows)
            found.append((size(model), model(inputs[rows]).detach()))
        (full_size, scores), (changed_size, changed) = found
        assert full_size != changed_size or (scores - changed).abs().max() > 1e-5


def test_augmentations_differ_and_the_order_of_neurons_keeps_the_image():
    torch.manual_seed(0)
    state = random_state(5)
    points = torch.rand(9, 2, dtype=torch.float64)
    images = activations(WIRING.graph(state), points)[-1]
    kinds = ablations.VARIANTS["augmentation"]
    assert kinds["none"] == {}
    changed = {name: kinds[name]["augmentation"](state) for name in kinds if name != "none"}
    for name, found in changed.items():
        same_image = torch.allclose(activations(WIRING.graph(found), points)[-1], images, atol=1e-12)
        assert same_image == (name == "order of neurons")
        assert not torch.equal(found["layers.1.weight"], state["layers.1.weight"])
    assert not kinds["images"]["augmentation"].permute
    assert kinds["both"]["augmentation"] == replace(Augmentation(), permute=True)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=3, max_size=5))
def test_permuted_networks_are_the_same_networks_in_other_orders(sizes):
    wiring = mlp(sizes, "siren")
    state = random_state(4, wiring)
    found = permuted(state)
    points = torch.rand(7, sizes[0], dtype=torch.float64)
    before, after = (activations(wiring.graph(s), points) for s in (state, found))
    torch.testing.assert_close(after[-1], before[-1], rtol=0, atol=1e-12)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new.sort(dim=1).values, old.sort(dim=1).values, rtol=0, atol=1e-12)


def test_every_network_gets_an_order_of_its_own():
    torch.manual_seed(0)
    state = random_state(6)
    found = permuted(state)
    pairs = zip(state["layers.0.weight"], found["layers.0.weight"], strict=True)
    orders = [torch.cdist(new, old).argmin(1) for old, new in pairs]
    for order in orders:
        assert sorted(order.tolist()) == list(range(32))
    assert len({tuple(order.tolist()) for order in orders}) == 6


# Each row keeps some edges and, of [e, eᵀ, e + eᵀ], some features of the plain form.
PLAIN = {
    "both": (None, [0, 1, 2]),
    "without_sum": (None, [0, 1]),
    "sum": (None, [2]),
    "forward": (False, [0]),
    "reversed": (True, [1]),
}


@pytest.mark.parametrize("head", [Scores(7), PerParameter(2)])
def test_plain_updates_agree_with_the_plain_form(head):
    """torch_geometric's norm over a graph, and states that are replaced."""
    wiring = mlp([2, 5, 4, 3], "siren")
    torch.manual_seed(0)
    fast = NGGNN(wiring, head, dropout=0.0, residual=False).double()
    plain = PlainNGGNN(Frame.of([wiring]), head, dropout=0.0, residual=False).double()
    graph = wiring.graph({name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in wiring.shapes.items()})
    fast.fit_normalization(graph)
    plain.load_state_dict(fast.state_dict())
    found, expected = fast(graph), plain(to_batch([graph], fast.frame))
    if isinstance(head, PerParameter):
        found = torch.cat(found.nodes, dim=1)
        expected = expected[0].view(3, -1, 2)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_norms_over_a_network_need_one_wiring():
    with pytest.raises(ValueError, match="residual=False"):
        NGGNN(Frame.of([WIRING]), Scores(10), residual=False)


def test_directions_differ_in_direction_alone():
    """Every weight meets Fourier frequencies of one deviation, and every bias of another."""
    for changes in ablations.VARIANTS["directions"].values():
        torch.manual_seed(0)
        encoder = build_model("NG-GNN", **changes).encoder
        copies = DIRECTIONS[changes.get("directions", "both")]
        assert encoder.node_frequencies.std() == pytest.approx(3.0, rel=0.2)
        for own in copies:
            if own:
                assert encoder.edge_frequencies[list(own)].sum(0).std() == pytest.approx(3 * 2**0.5, rel=0.25)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_directions_agree_with_the_plain_form_on_those_edges(directions):
    torch.manual_seed(0)
    wiring = mlp([2, 5, 4, 1], "siren")
    graph = wiring.graph(random_state(3, wiring))
    frame = Frame.of([wiring])
    fast = NGGNN(wiring, Scores(7), dropout=0.0, directions=directions).double()
    fast.fit_normalization(graph)
    plain = PlainNGGNN(frame, Scores(7), dropout=0.0).double()
    reads_inputs = directions == "reversed"
    if reads_inputs:
        plain.head[0] = torch.nn.Linear(2 * 64, 64).double()
    plain.encoder.edge_frequencies = torch.empty_like(fast.encoder.edge_frequencies)
    plain.load_state_dict(fast.state_dict())
    batch = to_batch([graph], frame)
    reverse, features = PLAIN[directions]
    kept = slice(None) if reverse is None else batch.edge_reversed == reverse
    for name in ("edge_attr", "present", "edge_slot", "edge_reversed"):
        batch[name] = batch[name][kept]
    batch.edge_index = batch.edge_index[:, kept]
    degree = torch.bincount(batch.edge_index[1], minlength=batch.num_nodes).double()
    delta = float(torch.log(degree + 1).mean())
    nodes, numbers = plain.encoder.nodes(batch), plain.encoder.standardize.edges(batch)[:, features]
    edges = plain.encoder.edges(encoding(numbers, plain.encoder.edge_frequencies))
    for layer in plain.layers:
        layer.propagation.aggr_module = PNAAggregation(delta)
        nodes, edges = layer(nodes, batch.edge_index, edges)
    read = nodes[batch.role == (0 if reads_inputs else 2)]
    torch.testing.assert_close(fast(graph), plain.head(read.reshape(3, -1)), rtol=0, atol=1e-9)


def test_unknown_choices_are_named():
    with pytest.raises(
        ValueError, match="directions is one of both, without_sum, sum, forward, reversed, not 'sideways'"
    ):
        NGGNN(WIRING, Scores(10), directions="sideways")
    with pytest.raises(ValueError, match="power 2, not 5"):
        NGGNN(WIRING, Scores(10), probes=5, probing="grid")
    with pytest.raises(ValueError, match="biases is one of feature, node, not 'salt'"):
        build_model("NG-GNN", biases="salt")
    with pytest.raises(ValueError, match="numbers per parameter need messages along the edges"):
        NGGNN(WIRING, PerParameter(), directions="reversed")
    with pytest.raises(ValueError, match="unknown question 'taste'"):
        ablations.trials("taste", [])
    with pytest.raises(ValueError, match="'biases' has no variants salt"):
        ablations.trials("biases", [], ["salt"])


def test_a_grid_is_the_centres_of_equal_squares():
    torch.testing.assert_close(grid(4, 2), torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]))
    torch.testing.assert_close(grid(1, 2), torch.zeros(1, 2))
    assert grid(27, 3).shape == (27, 3)
    torch.testing.assert_close(grid(3, 1), torch.tensor([[-2 / 3], [0], [2 / 3]]))


def test_fixed_probe_points_are_stored_and_not_learned():
    for probing in ("random", "grid"):
        probe = ProbeFeatures(Frame.of([WIRING]), 4, 8, probing)
        assert "points" in probe.state_dict()
        assert "points" not in dict(probe.named_parameters())


def test_statistics_per_neuron_are_those_of_every_single_number():
    torch.manual_seed(0)
    state = random_state(50)
    graph = WIRING.graph(state)
    own = StandardizedEntries(NGGNN(WIRING, Scores(10))).double()
    own.fit_normalization(graph)
    for name, values in own.standardized(graph).state_dict().items():
        mean, std = state[name].mean(0), state[name].std(0, correction=0)
        torch.testing.assert_close(values, (state[name] - mean) / std, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["NG-GNN", "NG-T"])
def test_statistics_per_neuron_break_the_symmetry(method):
    torch.manual_seed(0)
    state = random_state(8)
    twin = WIRING.symmetry.permute(state, WIRING.symmetry.random())
    for variant, breaks in (("layer", False), ("none", False), ("neuron", True)):
        model = build_model(method, normalization=variant).double().eval()
        model.fit_normalization(WIRING.graph(state))
        difference = (model(WIRING.graph(state)) - model(WIRING.graph(twin))).abs().max()
        assert difference > 1e-4 if breaks else difference < 1e-9


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_bias_nodes_hold_the_same_network(sizes):
    wiring = mlp(sizes, "siren")
    changed = bias_nodes(wiring)
    state = random_state(2, wiring)
    graph = changed.graph(state)
    assert changed.num_nodes == wiring.num_nodes + len(sizes) - 1
    back = graph.state_dict()
    assert all(torch.equal(back[name], values) for name, values in state.items())
    assert all((nodes == 0).all() for nodes in graph.nodes)
    points = torch.rand(5, sizes[0], dtype=torch.float64)
    for ours, theirs in zip(activations(graph, points), activations(wiring.graph(state), points), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_bias_nodes_of_a_traced_network():
    network = CNN(Architecture((3, 4, 5), (3, 3), (1, 1), (1, 1), ("relu", "tanh"), (-1, -1), 7)).double()
    wiring = bias_nodes(trace(network, torch.zeros(1, 3, 8, 8, dtype=torch.float64)))
    state = {name: values.detach() for name, values in network.state_dict().items()}
    back = wiring.graph(state).state_dict()
    assert all(torch.equal(back[name], values) for name, values in state.items())
    assert all(group.bias is None for group in wiring.groups)


@pytest.mark.parametrize("model", [NGGNN, NGT])
@pytest.mark.parametrize("training", [True, False])
def test_models_of_graphs_with_bias_nodes_are_invariant(model, training):
    torch.manual_seed(0)
    wiring = bias_nodes(mlp([2, 5, 4, 1], "siren"))
    state = random_state(3, wiring)
    twin = wiring.symmetry.permute(state, wiring.symmetry.random())
    metanetwork = model(wiring, Scores(7), probes=3, dropout=0.0).double().train(training)
    metanetwork.fit_normalization(wiring.graph(state))
    scores = metanetwork(wiring.graph(state))
    torch.testing.assert_close(metanetwork(wiring.graph(twin)), scores, rtol=0, atol=1e-9)
    state["layers.1.bias"][0] += 1  # and they see the biases
    assert (metanetwork(wiring.graph(state))[0] - scores[0]).abs().max() > 1e-5


def test_ng_gnn_with_bias_nodes_agrees_with_the_plain_form():
    torch.manual_seed(0)
    wiring = bias_nodes(mlp([2, 5, 4, 1], "siren"))
    graph = wiring.graph(random_state(3, wiring))
    frame = Frame.of([wiring])
    fast, plain = (model(frame, Scores(7), dropout=0.0).double() for model in (NGGNN, PlainNGGNN))
    fast.fit_normalization(graph)
    plain.load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast(graph), plain(to_batch([graph], frame)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", [NGGNN, NGT])
@pytest.mark.parametrize("positions", [True, False])
def test_without_positions_output_neurons_are_alike_too(model, positions):
    """Scores read output neurons in their order; before, without positions, nothing distinguishes them."""
    torch.manual_seed(0)
    wiring = mlp([3, 4, 5], "tanh")
    graph = wiring.graph(random_state(2, wiring))
    order = torch.tensor([4, 2, 0, 1, 3])
    metanetwork = model(wiring, PerParameter(3), positions=positions, normalization="none").double().eval()

    def numbers(some):
        return metanetwork(some).nodes[-1]

    difference = (numbers(permute(graph, {2: order})) - numbers(graph)[..., order, :]).abs().max()
    assert difference > 1e-5 if positions else difference < 1e-9


def test_linear_weights_lie_where_the_frame_says():
    networks = zoos.load((SMALL_PARK,), False)
    rows = torch.arange(6)
    centred, first = networks.collection[rows], networks.linear_collection[rows]
    middle, last = networks.frame.features // 2, networks.frame.layers + 1  # the row of weights to the outputs
    moved = 0
    for one, other in zip(centred.stacks, first.stacks, strict=True):
        linear = one.slot == last
        assert torch.equal(one.slot, other.slot)
        assert torch.equal(other.weights[:, ~linear], one.weights[:, ~linear])
        torch.testing.assert_close(other.weights[:, linear][..., 0], one.weights[:, linear][..., middle])
        assert (other.weights[:, linear][..., 1:] == 0).all()
        moved += int(linear.sum())
    assert moved == 6


def test_differences_are_those_of_paired_seeds():
    values = {"base": [1.0, 2.0, 4.0], "up": [2.0, 3.2, 4.9], "noise": [0.0, 3.0, 4.5], "single": [5.0]}
    values["same"] = values["base"]
    records = [
        {"config": {"method": "m", "variant": variant, "seed": seed}, "metrics": {"score": score}}
        for variant, scores in values.items()
        for seed, score in enumerate(scores)
    ]
    table = comparison.differences(records, "base", metric="score", scale=10).set_index("variant")
    assert table["verdict"].to_dict() == {
        "base": "base",
        "up": "better",
        "noise": "inside the noise",
        "single": "one seed",
        "same": "unchanged",
    }
    expected = stats.ttest_rel(values["up"], values["base"]).confidence_interval(0.95)
    np.testing.assert_allclose(table.loc["up", ["low", "high"]].astype(float), [10 * x for x in expected])
    np.testing.assert_allclose(table.loc["up", "difference"], 10 * (1.0 + 1.2 + 0.9) / 3)
    assert table.loc["single", "difference"] == 40
    assert np.isnan(table.loc["single", "low"])
    others = [{**record, "config": {**record["config"], "method": "MLP"}} for record in records]
    rows = comparison.differences(records[::-1] + others, "base", metric="score")
    assert rows["method"].tolist() == ["MLP"] * 5 + ["m"] * 5
    told = comparison.conclusion(table.reset_index().assign(method="m"), "points").splitlines()
    assert told == [
        "m: up: +10.3 points, better than the base",
        "m: noise: +1.7 points, inside the noise",
        "m: single: +40.0 points, one seed, which tells nothing about noise",
        "m: same: +0.0 points, nothing changes",
    ]
    alone = {"config": {"method": "m", "variant": "late", "seed": 9}, "metrics": {"score": 1.0}}
    table = comparison.differences([*records, alone], "base", metric="score").set_index("variant")
    assert table.loc["late", "verdict"] == "no common seed"
    assert np.isnan(table.loc["late", "difference"])
    with pytest.raises(ValueError, match="m has no runs of the variant 'full'"):
        comparison.differences(records, "full", metric="score")


def test_tables_show_differences_with_their_intervals(tmp_path):
    records = [
        {"config": {"method": "m", "variant": variant, "seed": seed}, "metrics": {"score": score}}
        for variant, scores in {"base": [1.0, 2.0], "other": [2.0, 3.1]}.items()
        for seed, score in enumerate(scores)
    ]
    table = comparison.differences(records, "base", metric="score")
    tables.write_table(table, tmp_path, "table", "About.")
    assert "| m | other | 2.5 ± 0.8 | 2 | +1.1 (+0.4 to +1.7) | better |" in (tmp_path / "table.md").read_text()
    assert "low,high" in (tmp_path / "table.csv").read_text()


def test_full_models_are_the_tables_own_runs_and_are_told_by_question():
    data = INRData("mnist", 32, 16, 16, 5, 1e-3)
    settings_ = {"dropout": 0.0}
    rows = rows_of([{"methods": ["NG-GNN", "NG-T"], "probes": [0, 64]}])
    table = [inr_classification.row_config(row, data, Schedule(1, 16), **settings_) for row in rows]
    own = [inr_classification.base_config(data, Schedule(1, 16), "NG-GNN", 64, 0, **settings_)]
    assert set(own) <= set(table)
    trials = ablations.trials("biases", own) + ablations.trials("normalization", own)
    assert [trial.config in table for trial in trials] == [True, False, True, False, False]
    records = []
    for trial in trials:
        record = make_record(asdict(trial.config), identity(trial.config), "d", {"test_accuracy": 0.5, "c": [[1]]}, {})
        records.append(ablations.record_of(trial.question, trial.variant, record))
    assert len({record["metrics"]["run"] for record in records}) == 4
    assert len({record["hash"] for record in records}) == 5
    assert records[0]["metrics"] == {"test_accuracy": 0.5, "run": run_hash(identity(own[0]), "d")}
    assert [r["config"]["variant"] for r in ablations.asked(records, "biases", probes=64)] == [
        "features of neurons",
        "edges of bias nodes",
    ]
    (again,) = [r for r in records if r["config"]["variant"] == "edges of bias nodes"]
    assert again["config"]["of"]["options"] == [["dropout", 0.0], ["biases", "node"]]


def test_changes_are_of_fields_of_the_schedule_or_options():
    config = Config("mnist", "MLP", 0, 0, INRData("mnist", 1, 1, 1, 1, 1e-3), Schedule(1), None, (("dropout", 0.0),))
    changed = changed_config(config, augmentation=ablations.ORDER, positions=False, batch=7)
    assert changed.schedule == Schedule(1, batch=7)
    assert changed.augmentation == ablations.ORDER
    assert changed.options == (("dropout", 0.0), ("positions", False))


def curve(method, seed, fitted, validation):
    return {"config": {"method": method, "seed": seed}, "metrics": {"fitted_loss": fitted, "val_loss": validation}}


def test_gap_at_equal_fit_is_the_mean_distance_of_the_curves():
    ours = curve("a", 0, [2.0, 1.0], [2.1, 1.3])  # test = 0.8 train + 0.5
    theirs = curve("b", 0, [1.5, 1.8, 0.5], [2.5, 2.8, 1.5])  # test = train + 1
    # where both were: 1.0 to 1.8; theirs - ours = 0.2 train + 0.5, at 1.4 on average
    assert loss_curves.gap_at_equal_fit(ours, theirs) == pytest.approx(0.78)
    apart = curve("b", 1, [0.9, 0.5], [1.0, 1.0])
    assert np.isnan(loss_curves.gap_at_equal_fit(ours, apart))
    bent = curve("b", 0, [2.0, 1.0, 1.5], [3.0, 2.0, 3.5])  # 2 at 1, 3.5 at 1.5, 3 at 2: 3 on average
    assert loss_curves.gap_at_equal_fit(ours, bent) == pytest.approx(3.0 - 1.7, abs=0.01)
    again = [ours, theirs, curve("a", 1, [2.0, 1.0], [2.1, 1.3]), apart]
    row = loss_curves.gaps(again, "a", "b").iloc[0]
    assert (row["seeds"], row["difference"]) == (1, pytest.approx(0.78))
    assert np.isnan(row["low"])
    assert loss_curves.gaps([ours, apart], "a", "b")["seeds"].tolist() == [0]
    with pytest.raises(ValueError, match="no loss curves of b"):
        loss_curves.gaps([ours], "a", "b")


def test_both_losses_are_measured_in_evaluation_mode():
    data = INRData("mnist", 32, 16, 16, 5, 1e-3)
    config = inr_classification.base_config(data, Schedule(2, 16), "DWSNet", 0, 0, dropout=0.5)
    sets, _ = inr_classification.load(config, "cpu")
    torch.manual_seed(0)
    problem = inr_classification.problem_of(config, sets | {"validation": sets["train"]}, "cpu")
    problem.model.eval()
    found = problem.validate()
    assert found["fitted_loss"] == pytest.approx(found["val_loss"], rel=1e-6)
    assert len(execute(config)["metrics"]["fitted_loss"]) == 2


def test_long_runs_are_those_of_the_table():
    """Table 7's full models and figure 4's are found where notebook 01 has stored them."""
    scale = {"validation_size": 16, "test_size": 16, "inr_steps": 5, "inr_learning_rate": 1e-3, "batch": 16}
    scale |= {"warmup": 2, "decay": True, "precision": "float32", "dropout": 0.0, "augment": False}
    rows = [{"methods": ["NG-GNN"], "recipe": "linear inputs", "sigma": None}]
    table = {**scale, "train_size": 64, "epochs": {"mnist": 3}, "datasets": ["mnist"], "rows": {"mnist": rows}}
    few = {"methods": [], "train": 16, "epochs": 1}
    configs = next(inr_classification.runs({**table, "overfitting": few}))
    p = {**scale, "train_size": 32, "epochs": 1, "long": {"train_size": 64, "epochs": 3}}
    assert ablations.long_configs(p, rows) == configs


ARCHITECTURE = Architecture(
    (3, 8, 6, 4, 5), (3, 5, 3, 3), (4, 1, 1, 1), (1, 2, 1, 1), ("relu", "tanh", "gelu", "relu"), (-1, -1, 0, 1)
)


def test_noise_changes_the_description_it_names():
    state = {name: values.detach() for name, values in CNN(ARCHITECTURE).state_dict().items()}
    random = np.random.default_rng(0)
    removed, same = architectural_noise.skips_removed((ARCHITECTURE, state), 1.0, random)
    assert removed.residual == (-1, -1, -1, -1)
    assert same is state
    assert architectural_noise.skips_removed((ARCHITECTURE, state), 0.0, random)[0] == ARCHITECTURE
    rewired, _ = architectural_noise.skips_rewired((ARCHITECTURE, state), 1.0, random)
    assert rewired.residual == (-1, -1, 0, 0)  # the third convolution has no other to begin at
    thin, fewer = architectural_noise.neurons_left_out((ARCHITECTURE, state), 0.5, random)
    assert thin.channels[0] == 3
    assert all(0 < few <= many for few, many in zip(thin.channels[1:], ARCHITECTURE.channels[1:], strict=True))
    assert sum(thin.channels) < sum(ARCHITECTURE.channels)
    assert thin.shapes == {name: tuple(values.shape) for name, values in fewer.items()}
    zoos.wiring_of(thin).graph(fewer)
    whole, every = architectural_noise.neurons_left_out((ARCHITECTURE, state), 0.0, random)
    assert whole == ARCHITECTURE
    assert all(torch.equal(every[name], values) for name, values in state.items())


def test_left_out_neurons_take_their_own_weights_along():
    state = {name: values.detach() for name, values in CNN(ARCHITECTURE).state_dict().items()}
    marked = {
        name: torch.arange(values.numel(), dtype=torch.float).view(values.shape) for name, values in state.items()
    }
    _, fewer = architectural_noise.neurons_left_out((ARCHITECTURE, marked), 0.5, np.random.default_rng(1))
    kept = [fewer[f"layers.{i}.bias"].long() for i in range(4)]  # a bias is its neuron's number
    for i in range(1, 4):
        expected = marked[f"layers.{i}.weight"][kept[i]][:, kept[i - 1]]
        assert torch.equal(fewer[f"layers.{i}.weight"], expected)
    assert torch.equal(fewer["fc.weight"], marked["fc.weight"][:, kept[3]])
    for layer, earlier in ((2, 0), (3, 1)):  # skip connections join equal numbers, before and after
        shared = min(len(kept[layer]), len(kept[earlier]))
        assert torch.equal(kept[layer][:shared], kept[earlier][:shared])


@pytest.mark.parametrize("method", ["StatNN", "NG-GNN", "NG-T"])
def test_noise_is_measured_on_the_networks_that_it_changes(method):
    (config,) = generalization.configs_of(
        "cifar10_wild_park", [SMALL_PARK], [method], 1, Schedule(1, 4), {method: 1e-3}
    )
    record = execute(config)
    thin = execute(architectural_noise.Config.on(config, "neurons left out", 0.9))["metrics"]
    true = record["metrics"]["test_cifar10_wild_park_true"]
    assert thin["changed"] == len(true)
    assert thin["tau_as_they_are"] == pytest.approx(record["metrics"]["test_cifar10_wild_park_tau"], abs=1e-6)
    removed = execute(architectural_noise.Config.on(config, "skips removed", 1.0))["metrics"]
    assert 0 < removed["changed"] < len(true)
    if method == "StatNN":
        assert removed["tau"] == removed["tau_as_they_are"]
    none = execute(architectural_noise.Config.on(config, "skips removed", 0.0))
    assert none["metrics"] == {"changed": 0}


def test_noise_that_is_none_is_an_error():
    (config,) = generalization.configs_of(
        "cifar10_wild_park", [SMALL_PARK], ["StatNN"], 1, Schedule(1, 4), {"StatNN": 1e-3}
    )
    with pytest.raises(ValueError, match="unknown noise 'dust'"):
        architectural_noise.Config.on(config, "dust", 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        architectural_noise.Config.on(config, "skips removed", 2.0)


FLAT = Architecture(
    (3, 4, 6, 5), (3, 3, 5), (4, 1, 1), (1, 1, 2), ("relu", "tanh", "gelu"), (-1, -1, 0), classes=7, pool=2
)


@pytest.mark.parametrize("flatten", ["layer", "repeat"])
def test_flattened_networks_have_every_parameter_and_their_symmetry(flatten):
    torch.manual_seed(0)
    network = CNN(FLAT).double().eval()
    state = {name: values.clone() for name, values in network.state_dict().items()}
    wiring = zoos.wiring_of(FLAT, flatten=flatten)
    back = wiring.graph(state).state_dict()
    assert all(torch.equal(back[name], values) for name, values in state.items())
    flattened = [group for group in wiring.groups if group.locations is not None]
    assert [group.size for group in flattened] == ([20] if flatten == "layer" else [5] * 4)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = network(images)
    twin = wiring.symmetry.permute(state, wiring.symmetry.random())
    network.load_state_dict(twin)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-12)
    assert not torch.equal(twin["fc.weight"], state["fc.weight"])


@pytest.mark.parametrize("flatten", ["layer", "repeat"])
def test_flattened_weights_join_each_channel_at_each_place_with_each_class(flatten):
    """fc.weight[k, c * 4 + r] is on the edge from channel c at location r to class k."""
    wiring = zoos.wiring_of(FLAT, flatten=flatten)
    state = {name: torch.zeros(shape) for name, shape in wiring.shapes.items()}
    state["fc.weight"] = torch.arange(7 * 20.0).view(7, 20)
    graph = wiring.graph(state)
    for block, edges in zip(wiring.blocks, graph.edges, strict=True):
        if block.weight == "fc.weight":
            places = wiring.groups[block.source].locations
            for k in range(7):
                for neuron, r in enumerate(places):
                    c = neuron // 4 if flatten == "layer" else neuron
                    assert edges[k, neuron, 0] == state["fc.weight"][k, 4 * c + r]
    into = [block for block in wiring.blocks if wiring.groups[block.target].locations is not None]
    kinds = {block.kind for block in into}
    assert kinds == ({"flatten"} if flatten == "layer" else {"convolution", "residual"})


@pytest.mark.parametrize("flatten", ["layer", "repeat"])
@pytest.mark.parametrize("training", [True, False])
def test_models_of_flattened_networks_are_invariant_and_know_the_places(flatten, training):
    torch.manual_seed(0)
    wiring = zoos.wiring_of(FLAT, flatten=flatten)
    state = {name: torch.randn(2, *shape, dtype=torch.float64) / 3 for name, shape in wiring.shapes.items()}
    twin = wiring.symmetry.permute(state, wiring.symmetry.random())
    turned = state | {"fc.weight": state["fc.weight"].unflatten(2, (5, 4)).flip(3).flatten(2)}
    networks = Collection([wiring.graph(s) for s in (state, twin, turned)])
    for model in (NGGNN, NGT):
        metanetwork = model(networks, Scores(), dropout=0.0).double().train(training)
        metanetwork.fit_normalization(networks, torch.arange(6))
        scores = metanetwork(networks[torch.arange(6)])
        torch.testing.assert_close(scores[2:4], scores[:2], rtol=0, atol=1e-9)
        assert (scores[4:] - scores[:2]).abs().max() > 1e-6


def test_a_park_whose_networks_flatten():
    recipe = wild_park.FlattenedRecipe(64, 20, 1, 1)
    assert recipe.name.startswith("wild_park_flattened_64train")
    assert wild_park.draw_architecture(0, 3, 2) == replace(wild_park.draw_architecture(0, 3), pool=2)
    networks = zoos.load((zoos.Zoo(8, recipe),), False)
    assert set(networks.table["dataset"]) == {"cifar10_wild_park_flattened"}
    layer, repeat = networks.collection, networks.repeated_collection
    assert layer.frame.locations == repeat.frame.locations == 4
    assert (repeat.sizes < layer.sizes).all()


def test_a_pool_without_places_is_an_error():
    with pytest.raises(ValueError, match="classes and pool are at least 1"):
        replace(FLAT, pool=0)
