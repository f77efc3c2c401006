"""Bias nodes and parameter graphs are wirings: views, batches, state dicts and the symmetry come with them."""

import pytest
import torch
from torch import nn

from ngcore.graph import mlp, to_parameter_graph, trace
from ngcore.graph.dialects import bias_nodes, parameter_wiring
from ngcore.models import NGGNN, NGT, PerParameter, Scores


class ResidualCNN(nn.Module):
    """Batch norms, a residual connection, a flatten."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(16, 5)

    def forward(self, images):
        x = self.stem(images).relu()
        x = (x + self.norm(self.conv(x))).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


NETWORKS = {
    "residual": (ResidualCNN, torch.zeros(2, 3, 9, 9)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(2, 5, 8)),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)),
        torch.zeros(2, 3, 9, 9),
    ),
    "norm at the end": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4)), torch.zeros(5, 3)),
}


def networks_of(name, count=3):
    make, example = NETWORKS[name]
    torch.manual_seed(0)
    made = [make().double().eval() for _ in range(count)]
    for network in made:
        for values in network.parameters():
            values.data = torch.randn_like(values)
    return trace(made[0], example.double()), [network.state_dict() for network in made]


@pytest.mark.parametrize("dialect", [bias_nodes, parameter_wiring])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_dialect_gives_every_parameter_back(name, dialect):
    wiring, states = networks_of(name)
    graph = dialect(wiring).graph(states)
    assert all(group.bias is None for group in graph.wiring.groups)
    back = graph.state_dict()
    for key, values in back.items():
        assert torch.equal(values, torch.stack([state[key] for state in states])), key


@pytest.mark.parametrize("name", NETWORKS)
def test_a_parameter_graph_has_one_edge_for_every_parameter(name):
    wiring, states = networks_of(name, count=1)
    data = to_parameter_graph(wiring.graph(states[0]))
    own = data.edge_attr[data.edge_weighted].flatten().sort().values
    parameters = torch.cat([states[0][name].flatten() for name in wiring.shapes]).sort().values
    assert torch.equal(own, parameters)


def test_a_norm_shares_the_neurons_that_it_scales():
    wiring, _ = networks_of("residual")
    graph = parameter_wiring(wiring)
    kinds = [group.kind for group in graph.groups]
    assert kinds.count("gamma") == kinds.count("beta") == 1
    assert sum(group.size for group in graph.groups if group.kind == "neuron") == 3 + 4 + 4 + 16 + 5
    assert sum(group.size for group in wiring.groups) == 3 + 4 + 4 + 4 + 16 + 5


@pytest.mark.parametrize("model", [NGGNN, NGT])
@pytest.mark.parametrize("name", ["residual", "norm at the end"])
def test_models_read_parameter_graphs_and_keep_their_symmetry(name, model):
    wiring, states = networks_of(name)
    dialect = parameter_wiring(wiring)
    graph = dialect.graph(states)
    state = {key: values for key, values in graph.state_dict().items() if key in wiring.shapes}
    order = wiring.symmetry.random(torch.Generator().manual_seed(0))
    twin = dialect.graph(wiring.symmetry.permute(state, order))
    torch.manual_seed(0)
    scores = model(dialect, Scores(3)).double().eval()
    scores.fit_normalization(graph)
    torch.testing.assert_close(scores(twin), scores(graph), rtol=0, atol=1e-9)
    numbers = model(dialect, PerParameter()).double().eval()
    numbers.fit_normalization(graph)
    moved = wiring.symmetry.permute(numbers(graph).state_dict(), order)
    for key, values in numbers(twin).state_dict().items():
        torch.testing.assert_close(values, moved[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", [NGGNN, NGT])
def test_probe_features_work_with_bias_nodes(model):
    wiring = bias_nodes(mlp([2, 5, 4, 1], "siren"))
    graph = wiring.graph([{name: torch.randn(shape) for name, shape in wiring.shapes.items()} for _ in range(3)])
    metanetwork = model(wiring, Scores(2), probes=4)
    metanetwork.fit_normalization(graph)
    assert metanetwork(graph).shape == (3, 2)
