"""Learned optimizers: their rule against loops, equivariance, what carries over to other networks, refusals."""

import copy
import json
import math

import pytest
import torch
from cnns import architectures
from hypothesis import given, settings
from safetensors.torch import load as weights_in
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.graph import TraceError
from ngcore.models.optimizers import FEATURES, METHODS, BoundOptimizer, Layout, LearnedOptimizer
from ngcore.models.optimizers.context import NFNContext, NGGNNContext
from ngcore.models.optimizers.files import RULE, load, provenance, save, shipped
from ngcore.models.optimizers.learned import ALPHA, BETA, DECAYS, P, log_and_sign, scalar_features

each_method = pytest.mark.parametrize("method", METHODS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
few = settings(deadline=None, max_examples=6)


def cnn(*channels, kernel=3, activation="relu"):
    layers = len(channels) - 1
    return CNN(
        Architecture(
            channels,
            (kernel,) * layers,
            (1,) * layers,
            (kernel // 2,) * layers,
            (activation,) * layers,
            (-1,) * layers,
            3,
        )
    )


class Residual(nn.Module):
    """A residual block with batch norm and a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.fc((x + self.pointwise(self.depthwise(x))).mean((2, 3)))


class Transformer(nn.Module):
    """Word embeddings and a block of attention with two heads."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.block(self.words(tokens)).mean(1))


IMAGES = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "chain": (lambda: cnn(2, 4, 3, 4), IMAGES),
    "residual": (Residual, IMAGES),
    "transformer": (Transformer, TOKENS),
}


def rule_of(method, training=False):
    """A rule in float64 of which no number is 0 or 1 by construction, and whose changes are large."""
    torch.manual_seed(1)
    rule = LearnedOptimizer(method).double().train(training)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return rule


def random_features(layout, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, layout.count, FEATURES, dtype=torch.float64, generator=generator) * 2 - 1


def permuted(layout, permutations, rows):
    """Rows of scalars (batch, scalars, f) of the network whose neurons are permuted."""
    state = dict(zip(layout.shapes, layout.split(rows.movedim(-1, 1)), strict=True))
    moved = layout.wiring.symmetry.permute(state, permutations)
    return layout.flatten(moved[name] for name in layout.shapes).movedim(1, -1)


def test_preprocessing_is_the_papers():
    """Andrychowicz et al., 2016, appendix A, one number at a time."""
    values = [0.0, 1e-9, -1e-9, math.exp(-P), -math.exp(-P), 4e-5, 0.3, -0.3, 1.0, -7.0]
    for value, found in zip(values, log_and_sign(torch.tensor(values, dtype=torch.float64)).tolist(), strict=True):
        large = abs(value) >= math.exp(-P)
        expected = [math.log(abs(value)) / P, math.copysign(1, value)] if large else [-1, math.exp(P) * value]
        assert found == pytest.approx(expected, abs=1e-12)


def test_ff_is_a_loop_over_scalars():
    """Three steps of FF against the formulas of Metz et al. (2019), scalar by scalar, momenta included."""
    rule, network = rule_of("FF"), cnn(2, 3, 2).double()
    weights = [[p.item() for p in parameter.flatten()] for parameter in network.parameters()]
    momenta = [[[0.0] * len(DECAYS) for _ in own] for own in weights]
    optimizer = rule.bind(network)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) ** 3
        for number, parameter in enumerate(network.parameters()):
            for i, gradient in enumerate(parameter.grad.flatten().tolist()):
                own = momenta[number][i]
                own[:] = [decay * m + (1 - decay) * gradient for decay, m in zip(DECAYS, own, strict=True)]
                x = []
                for value in (weights[number][i], gradient, *own):
                    large = abs(value) >= math.exp(-P)
                    x += [math.log(abs(value)) / P, math.copysign(1, value)] if large else [-1, math.exp(P) * value]
                direction, magnitude = rule.network(torch.tensor(x, dtype=torch.float64)).tolist()
                weights[number][i] -= BETA * direction * math.exp(ALPHA * magnitude)
        optimizer.step()
        for parameter, expected in zip(network.parameters(), weights, strict=True):
            assert parameter.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_lstm_reads_the_averages_of_layers():
    rule, layout = rule_of("LSTM"), Layout.of(cnn(2, 3, 2))
    features = random_features(layout)
    state = h = None
    expected = []
    for own in features.split(layout.sizes, dim=1):
        h, state = rule.context.lstm(own.mean(1, keepdim=True), state)
        expected.append(h.expand(-1, own.shape[1], -1))
    found = rule.context(features, layout)
    assert h.abs().max() > 0.01
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("build", "inputs"), NETWORKS.values(), ids=NETWORKS)
def test_layout_places_every_scalar(build, inputs):
    """Every number of a scalar stands where the graph has its parameter, and comes back from there."""
    layout = Layout.of(build(), inputs)
    features = random_features(layout)
    graph = layout.graph(features)
    assert torch.equal(layout.row(graph, FEATURES), features)
    wiring = layout.wiring
    for f in range(FEATURES):
        own = wiring.graph(dict(zip(layout.shapes, layout.split(features[..., f]), strict=True)))
        for group, found, wanted in zip(wiring.groups, graph.nodes, own.nodes, strict=True):
            assert torch.equal(found[..., f : f + 1], wanted if group.bias else torch.zeros_like(wanted))
        for block, found, wanted in zip(wiring.blocks, graph.edges, own.edges, strict=True):
            numbers = found[..., f::FEATURES]  # of every place of a kernel
            assert torch.equal(numbers, wanted if block.weight else torch.zeros_like(wanted))


def test_degrees_of_a_layout_are_counted():
    layout, context = Layout.of(cnn(2, 4, 3), IMAGES), NGGNNContext()
    context.fit_normalization(layout)
    degrees = torch.tensor([4] * 2 + [2 + 3] * 4 + [4 + 3] * 3 + [3] * 3)  # of every neuron
    assert context.mean_log_degree.item() == pytest.approx(torch.log(degrees + 1.0).mean().item(), abs=1e-6)


# What rules of these weights said of these features when those that are shipped said what they had said before their
# contexts were made of batched graphs.
FIXED = {
    "FF": [2.438081463896e-03, 1.646906996481e-03, 1.733167663670e-03, 3.420937967756e-03, 3.434201425583e-03],
    "LSTM": [8.166593892276e-04, 1.319876272042e-03, 2.104052323542e-03, 1.665313478088e-03, 1.130074831921e-03],
    "NFN": [9.143093269546e-03, 8.515196215528e-03, -3.874117196263e-03, 5.934529365781e-04, 6.064051644319e-03],
    "NG-GNN": [2.512512490696e-03, 3.568190432960e-03, 3.426697508845e-03, 3.118466415821e-03, 2.822049210124e-03],
    "NG-T": [1.815323568908e-03, 1.149132995768e-03, 9.640575750865e-04, 1.243205102165e-03, 1.524808249591e-03],
}


@each_method
def test_rules_say_what_they_said(method):
    """So that a shipped optimizer goes on being what it was meta-trained to be."""
    layout = Layout.of(cnn(1, 2, 3, 2), torch.zeros(1, 1, 5, 5))
    features = torch.arange(layout.count * FEATURES, dtype=torch.float64).view(1, -1, FEATURES).sin()
    rule = LearnedOptimizer(method).double()
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(rule.named_parameters())):
            p.copy_(0.5 * (torch.arange(p.numel(), dtype=torch.float64) + i).sin().view(p.shape))
        (changes,) = rule(features, layout)
    assert changes[[0, 20, 50, 80, -1]].tolist() == pytest.approx(FIXED[method], rel=1e-9)


@each_mode
@each_method
@pytest.mark.parametrize("name", NETWORKS)
def test_changes_permute_with_neurons(method, name, training):
    """Weights, gradients and momenta of a network with permuted hidden channels get permuted changes, alone and in a
    batch; the changes of single scalars differ."""
    if method == "NFN" and name != "chain":
        pytest.skip("NFN reads chains of layers")
    build, inputs = NETWORKS[name]
    layout = Layout.of(build(), inputs)
    rule, features = rule_of(method, training), random_features(layout)
    permutations = layout.wiring.symmetry.random(torch.Generator().manual_seed(3))
    with torch.no_grad():
        changes = rule(features, layout)
        moved = rule(permuted(layout, permutations, features), layout)
        alone = rule(features[1:], layout)
    assert len(changes[0].unique()) > layout.count // 2
    torch.testing.assert_close(alone[0], changes[1], rtol=1e-9, atol=1e-9)
    expected = permuted(layout, permutations, changes.unsqueeze(-1)).squeeze(-1)
    assert not torch.equal(expected, changes)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


@few
@given(architecture=architectures())
def test_changes_permute_on_random_architectures(architecture):
    """Of any depth, width, activation and skip connections, with kernels that fit the window."""
    kernels = tuple(min(k, 3) for k in architecture["kernel_size"])
    changes = {"kernel_size": kernels, "padding": tuple(k // 2 for k in kernels), "stride": (1,) * len(kernels)}
    architecture = Architecture(**architecture | changes)
    layout = Layout.of(CNN(architecture), torch.randn(1, architecture.channels[0], 7, 7))
    features = random_features(layout)
    permutations = layout.wiring.symmetry.random(torch.Generator().manual_seed(3))
    for method in ("FF", "LSTM", "NG-GNN", "NG-T"):
        with torch.no_grad():
            changes, moved = (rule_of(method)(x, layout) for x in (features, permuted(layout, permutations, features)))
        expected = permuted(layout, permutations, changes.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["LSTM", "NFN", "NG-GNN", "NG-T"])
def test_the_rest_of_the_network_matters(method):
    """The second layer's gradients change what happens to the last biases; in FF they do not."""
    layout = Layout.of(cnn(2, 4, 3, 4), IMAGES[:1])
    features = random_features(layout, 1)
    other = features.clone()
    start = sum(layout.sizes[:2])
    other[:, start : start + layout.sizes[2], 2:] *= -1
    for name, expected in ((method, True), ("FF", False)):
        rule = rule_of(name)
        with torch.no_grad():
            found = (rule(other, layout) - rule(features, layout))[0, -3:]
        assert (found.abs() > 1e-9).any() == expected


@each_method
def test_one_rule_runs_on_other_networks(method):
    """Unchanged: other widths, numbers of colours and classes; where layers belong to it, not on others."""
    rule = LearnedOptimizer(method)
    before = {name: values.clone() for name, values in rule.state_dict().items()}
    images = torch.randn(2, 3, 9, 9)
    for network in (cnn(3, 5, 6, 5), cnn(3, 4, 2, 3, activation="tanh")):
        optimizer = rule.bind(network, images)
        F.cross_entropy(network(images), torch.tensor([0, 2])).backward()
        weights = [p.detach().clone() for p in network.parameters()]
        optimizer.step()
        assert all(not torch.equal(p, w) for p, w in zip(network.parameters(), weights, strict=True))
        assert all(torch.isfinite(p).all() for p in network.parameters())
    for name, values in rule.state_dict().items():
        assert torch.equal(values, before[name])


@each_method
def test_save_and_resume_reproduce_the_weights(method):
    def network_and_optimizer():
        torch.manual_seed(0)
        network = cnn(2, 4, 3, 4)
        return network, rule.bind(network, IMAGES[:1])

    def train(network, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            F.cross_entropy(network(IMAGES + step), torch.arange(6) % 3).backward()
            optimizer.step()

    torch.manual_seed(5)
    rule = LearnedOptimizer(method)
    network, optimizer = network_and_optimizer()
    train(network, optimizer, range(3))
    stored = (
        json.loads(json.dumps(optimizer.state_dict()["param_groups"])),
        optimizer.state_dict(),
        network.state_dict(),
    )
    copies = [{k: v.clone() for k, v in own.items()} for own in stored[1]["state"].values()]
    weights = {name: values.clone() for name, values in stored[2].items()}
    train(network, optimizer, range(3, 6))

    again, resumed = network_and_optimizer()
    again.load_state_dict(weights)
    resumed.load_state_dict({"state": dict(enumerate(copies)), "param_groups": stored[0]})
    train(again, resumed, range(3, 6))
    for ours, theirs in zip(again.parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@each_method
def test_a_file_gives_the_rule_back(method, tmp_path):
    rule = LearnedOptimizer(method)
    if isinstance(rule.context, NGGNNContext):
        rule.context.mean_log_degree.fill_(2.5)
    save(rule, tmp_path / "rule.safetensors", {"trained": "never"})
    again = load(tmp_path / "rule.safetensors")
    layout = Layout.of(cnn(2, 4, 3, 4), IMAGES[:1])
    features = random_features(layout).float()
    with torch.no_grad():
        assert torch.equal(rule.eval()(features, layout), again(features, layout))


def test_closures_and_sizes():
    network = cnn(2, 4, 3, 4)
    optimizer = LearnedOptimizer("FF").bind(network)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(network(IMAGES), torch.arange(6) % 3)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(1.1, abs=0.5)
    counts = {m: sum(p.numel() for p in LearnedOptimizer(m).parameters()) for m in METHODS}
    assert counts["FF"] == (14 * 32 + 32) + (32 * 32 + 32) + (32 * 2 + 2)
    assert counts["LSTM"] == counts["FF"] + 32 * 32 + 4 * 32 * (14 + 32 + 2)


def gradients_of(network, value=1.0):
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_missing_gradients_are_named():
    network = cnn(2, 3, 2)
    optimizer = LearnedOptimizer("FF").bind(network)
    gradients_of(network)
    network.fc.weight.grad = None
    with pytest.raises(ValueError, match=r"no gradient of fc\.weight: call loss\.backward"):
        optimizer.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_change_nothing(bad):
    network = cnn(2, 3, 2)
    optimizer = LearnedOptimizer("FF").bind(network)
    gradients_of(network)
    optimizer.step()
    before = [p.detach().clone() for p in network.parameters()]
    momenta = [own["momenta"].clone() for own in optimizer.state.values()]
    network.layers[1].bias.grad[0] = bad
    with pytest.raises(FloatingPointError, match=r"gradient of layers\.1\.bias is not finite; nothing was changed"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
    assert all(torch.equal(own["momenta"], old) for own, old in zip(optimizer.state.values(), momenta, strict=True))


class Unreadable(nn.Module):
    """An operator that has no rule between its layers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.linalg.inv(self.layer(x)))


class Unread(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.spare = nn.Linear(4, 3), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("bind", "error", "message"),
    [
        (lambda: LearnedOptimizer("NG-GNN").bind(cnn(2, 3)), ValueError, "give example inputs too"),
        (lambda: LearnedOptimizer("NG-GNN").bind(Unreadable(), torch.eye(4)), TraceError, "linalg_inv"),
        (lambda: LearnedOptimizer("NG-T").bind(Unread(), torch.randn(2, 4)), ValueError, "no operator reads .*spare"),
        (
            lambda: LearnedOptimizer("NG-GNN").bind(cnn(2, 3, kernel=5), IMAGES),
            ValueError,
            r"layers\.0\.weight: a kernel of size \(5, 5\) does not fit into the window \(3, 3\)",
        ),
        (lambda: LearnedOptimizer("NFN").bind(cnn(2, 3, 4), IMAGES), ValueError, r"built for .*\[3, 3, 3\]"),
        (lambda: LearnedOptimizer("NFN").bind(Residual(), IMAGES), ValueError, "chains of layers"),
        (lambda: LearnedOptimizer("FF").bind(nn.ReLU()), ValueError, "ReLU has no parameters"),
        (lambda: LearnedOptimizer("SGD"), ValueError, "unknown method 'SGD'; there are FF, LSTM"),
    ],
)
def test_what_cannot_be_bound_is_told(bind, error, message):
    with pytest.raises(error, match=message):
        bind()


def test_further_parameters_are_refused():
    optimizer = LearnedOptimizer("FF").bind(cnn(2, 3))
    with pytest.raises(ValueError, match="bound to one network"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_files_that_do_not_fit_are_told(tmp_path):
    path = tmp_path / "rule.safetensors"
    save(LearnedOptimizer("FF"), path, {})
    content = path.read_bytes()
    weights = weights_in(content)
    path.write_bytes(content[:200])
    with pytest.raises(ValueError, match=r"rule\.safetensors holds no learned optimizer"):
        load(path)
    save_file(weights, path)
    with pytest.raises(ValueError, match="holds no learned optimizer"):
        load(path)
    for about, message in (
        ({"method": "FF", "options": {}, "rule": RULE | {"features": 10}}, "was trained for another rule"),
        ({"method": "FF", "options": {}}, "was trained for another rule, None"),
        ({"method": "LSTM", "options": {}, "rule": RULE}, "holds no optimizer of the method it names"),
        ({"method": "FF", "options": {"depth": 3}, "rule": RULE}, "holds no optimizer of the method it names"),
        ({"method": "SGD", "options": {}, "rule": RULE}, r"rule\.safetensors .* unknown method 'SGD'"),
    ):
        save_file(weights, path, metadata={"ngcore": json.dumps(about)})
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_shipped_was_trained(method):
    """With its provenance: how long, on what, where, from which code."""
    about = provenance(method)
    assert about["method"] == method
    assert about["best_step"] >= 50
    assert about["outer_steps"] >= 200
    assert about["trained_on"]["dataset"] == "fashion_mnist"
    assert about["device"]
    assert about["commit"]
    assert isinstance(shipped(method), LearnedOptimizer)


def test_states_of_others_are_refused():
    network, other = cnn(2, 3, 2), cnn(2, 4, 2)
    optimizers = [LearnedOptimizer("FF").bind(network), LearnedOptimizer("FF").bind(other)]
    optimizers.append(torch.optim.Adam(network.parameters()))
    for optimizer, own in zip(optimizers, (network, other, network), strict=True):
        gradients_of(own)
        optimizer.step()
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    with pytest.raises(ValueError, match=r"layers\.0\.weight must be its momenta \(5, 3, 2, 3, 3\), not momenta"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    with pytest.raises(ValueError, match=r"layers\.0\.weight must be its momenta .* not step \(\), exp_avg"):
        optimizers[0].load_state_dict(optimizers[2].state_dict())


def test_copies_step_alike():
    network = cnn(2, 3, 2)
    optimizer = LearnedOptimizer("LSTM").bind(network)
    gradients_of(network)
    optimizer.step()
    again = copy.deepcopy(optimizer)
    for p, own in zip(again.parameters, optimizer.parameters, strict=True):
        assert p is not own
        p.grad = own.grad.clone()
    optimizer.step()
    again.step()
    assert all(torch.equal(p, own) for p, own in zip(again.parameters, optimizer.parameters, strict=True))


def test_another_device_is_told():
    with pytest.raises(ValueError, match="the optimizer is on meta, the network on cpu"):
        LearnedOptimizer("FF").to("meta").bind(cnn(2, 3))


def test_features_of_a_batch_are_those_of_each():
    weights, gradients, momenta = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 5, 4)
    found = scalar_features(weights, gradients, momenta)
    assert found.shape == (3, 4, FEATURES)
    for i in range(3):
        assert torch.equal(found[i], scalar_features(weights[i], gradients[i], momenta[i]))


def test_nfn_is_for_the_layers_it_was_built_for():
    rule = LearnedOptimizer("NFN", kernel_size=(3,))
    assert isinstance(rule.context, NFNContext)
    rule.bind(cnn(2, 5), IMAGES)


def test_the_tied_share_their_change():
    """Parameters under two names are one; their first place on the graph speaks for them."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    network = Tied()
    for method in ("FF", "NG-GNN", "NG-T"):
        optimizer = LearnedOptimizer(method).bind(network, torch.randn(3, 4))
        assert isinstance(optimizer, BoundOptimizer)
        network(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        assert network.first.weight is network.second.weight
