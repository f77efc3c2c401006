"""The plain models and the plain INR fit, against brute force; what models must be is in `test_contract`."""

import math

import pytest
import torch
from torch import Tensor

from ngcore.graph import NeuralGraph, Wiring, mlp
from ngcore.graph.frame import Frame
from ngcore.models import Scores
from ngcore.reference import ng_gnn as plain_ng_gnn
from ngcore.reference import ng_t as plain_ng_t
from ngcore.reference.encoder import to_batch, to_data_list
from ngcore.reference.inr import Siren, fit_one, pixel_coordinates
from ngcore.reference.ng_gnn import PlainNGGNN
from ngcore.reference.ng_t import PlainNGT

SMALL = mlp([2, 5, 3, 2], "siren")
FRAME = Frame.of([SMALL])


def random_graph(wiring: Wiring, count: int, seed: int = 0) -> NeuralGraph:
    generator = torch.Generator().manual_seed(seed)
    return wiring.graph(
        {
            name: 0.1 * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
            for name, shape in wiring.shapes.items()
        }
    )


def random_encoder(model_class):
    """Of a model in float64 whose standardization differs between layers."""
    torch.manual_seed(1)
    encoder = model_class(FRAME, Scores(4), probes=3).double().encoder
    for name, buffer in encoder.named_buffers():
        if name.endswith("_mean"):
            buffer[1:].normal_(std=0.1)
        if name.endswith("_std"):
            buffer[1:].uniform_(0.5, 1.5)
    return encoder


def test_data_holds_both_directions_of_every_weight():
    graph = random_graph(SMALL, 2)
    data = to_data_list([graph], FRAME)[1]
    seen = set()
    for e in range(data.num_edges):
        source, target = data.edge_index[:, e].tolist()
        forward = data.layer[source] < data.layer[target]
        low, high = (source, target) if forward else (target, source)
        block = int(data.layer[low])
        weight = float(graph.edges[block][1, high - SMALL.offsets[block + 1], low - SMALL.offsets[block], 0])
        assert data.edge_attr[e].tolist() == ([weight, 0, weight] if forward else [0, weight, weight])
        assert data.present[e].tolist() == ([True, False, True] if forward else [False, True, True])
        assert data.edge_slot[e] == block + 1
        seen.add((source, target))
    assert len(seen) == data.num_edges == 2 * (2 * 5 + 5 * 3 + 3 * 2)
    assert data.position_row.tolist() == [0, 1, *[2] * 5, *[3] * 3, 4, 5]
    assert data.layer_row.tolist() == [0, 0, *[1] * 5, *[2] * 3, 3, 3]
    assert data.node_slot.tolist() == data.layer_row.tolist()


@pytest.mark.parametrize("model_class", [PlainNGGNN, PlainNGT])
def test_encoder_scalar_by_scalar(model_class):
    """One node and one edge at a time, from Python floats."""
    graph, encoder = random_graph(SMALL, 1), random_encoder(model_class)
    data, standardize = to_batch([graph], FRAME), encoder.standardize
    with torch.no_grad():
        nodes = encoder.nodes(data)
        node = SMALL.offsets[2] + 1  # neuron 1 of the second hidden layer
        bias = (graph.nodes[2][0, 1, 0] - standardize.node_mean[2]) / standardize.node_std[2]
        expected = encoder.node_fourier(gamma([float(bias)], encoder.node_frequencies))
        probed = torch.stack([hidden_activation(graph, point)[1] for point in encoder.probe.points])
        expected = expected + encoder.probe.norm[2](encoder.probe.project[2](probed))
        expected = encoder.node_linear(expected) + encoder.positions[3]
        torch.testing.assert_close(nodes[node], expected, atol=1e-12, rtol=0)

        first = encoder.node_fourier(gamma([0.0], encoder.node_frequencies))  # input nodes have feature 0
        coordinate = encoder.probe.points[:, 1]
        first = first + encoder.probe.norm[0](encoder.probe.project[0](coordinate))
        first = encoder.node_linear(first) + encoder.positions[1]
        torch.testing.assert_close(nodes[1], first, atol=1e-12, rtol=0)

        edges = encoder.edges(encoder.encoded(data, torch.ones_like(data.edge_reversed)))
        source = SMALL.offsets[1] + 4
        weight = float((graph.edges[1][0, 1, 4, 0] - standardize.edge_mean[2]) / standardize.edge_std[2])
        features = {(source, node): [weight, 0.0, weight], (node, source): [0.0, weight, weight]}
        index = data.edge_index.T.tolist()
        for pair, numbers in features.items():
            encoding = gamma(numbers[: encoder.edge_features], encoder.edge_frequencies)
            expected = encoder.edge_linear(encoder.edge_fourier(encoding))
            torch.testing.assert_close(edges[index.index(list(pair))], expected, atol=1e-12, rtol=0)


def test_pairs_without_an_edge_read_zeros():
    graph, model = random_graph(SMALL, 2), PlainNGT(FRAME, Scores(4)).double()
    batch, encoder = to_batch([graph], FRAME), model.encoder
    with torch.no_grad():
        encoded = encoder.encoded(batch, ~batch.edge_reversed)
        source, target = batch.edge_index[:, ~batch.edge_reversed]
        pairs = model.pairs(encoded, (batch.batch[source], target % 12, source % 12), 2, 12)
        none = encoder.edge_linear(encoder.edge_fourier(torch.zeros(256, dtype=torch.float64)))
        for network in range(2):
            for i in range(12):
                for j in range(12):
                    edge = ((target == 12 * network + i) & (source == 12 * network + j)).nonzero().flatten().tolist()
                    expected = encoder.edges(encoded[edge[0]]) if edge else none
                    torch.testing.assert_close(pairs[network, i, j], expected, atol=1e-12, rtol=0)


def gamma(features: list[float], frequencies: Tensor) -> Tensor:
    angles = [
        2 * math.pi * sum(x * float(frequencies[f, k]) for f, x in enumerate(features))
        for k in range(frequencies.shape[1])
    ]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)


def hidden_activation(graph: NeuralGraph, point: Tensor) -> Tensor:
    """Second hidden layer of the first network of a batch, at one point."""
    parameters = graph[0].state_dict()
    state = point
    for i in range(2):
        state = torch.sin(30 * (parameters[f"layers.{i}.weight"] @ state + parameters[f"layers.{i}.bias"]))
    return state


def test_ng_gnn_layer_node_by_node():
    torch.manual_seed(0)
    edge_index = to_batch([random_graph(SMALL, 1)], FRAME).edge_index
    delta = 1.5
    layer = plain_ng_gnn.Layer(delta, dropout=0.2, last=False).double().eval()
    nodes, edges = torch.randn(SMALL.num_nodes, 64).double(), torch.randn(edge_index.shape[1], 64).double()
    degrees = [len(incoming(edge_index, i)) for i in range(SMALL.num_nodes)]
    assert degrees == [5, 5, *[5] * 5, *[7] * 3, 3, 3]  # 5 = 2 + 3 and 7 = 5 + 2 count reversed edges

    with torch.no_grad():
        new_nodes, new_edges = layer(nodes, edge_index, edges)
        for i in range(SMALL.num_nodes):
            messages = []
            for e, j in incoming(edge_index, i):
                film = layer.film(edges[e])
                messages.append(film[:64] * layer.message(torch.cat([nodes[i], nodes[j]])) + film[64:])
            m = torch.stack(messages)
            std = torch.sqrt(m.var(dim=0, correction=0) + 1e-5)
            statistics = torch.cat([m.mean(0), m.amin(0), m.amax(0), std])
            amplified = math.log(degrees[i] + 1) / delta * statistics
            state = layer.output(layer.update(torch.cat([nodes[i], statistics, amplified])))
            state = layer.norm(state)
            expected = nodes[i] + state * torch.sigmoid(state)
            torch.testing.assert_close(new_nodes[i], expected, atol=1e-9, rtol=0)
        for e, (j, i) in enumerate(edge_index.T.tolist()):
            state = layer.edge_state(edges[e])
            state = state + layer.edge_source(new_nodes[j]) + layer.edge_target(new_nodes[i])
            expected = layer.edge_output(state * torch.sigmoid(state))
            torch.testing.assert_close(new_edges[e], expected, atol=1e-9, rtol=0)


def incoming(edge_index: Tensor, target: int) -> list[tuple[int, int]]:
    """(edge, source) of every edge into a node."""
    return [(e, j) for e, (j, i) in enumerate(edge_index.T.tolist()) if i == target]


def test_ng_t_layer_pair_by_pair():
    torch.manual_seed(0)
    n = 4
    layer = plain_ng_t.Layer(dropout=0.2, last=False).double().eval()
    nodes, edges = torch.randn(1, n, 64).double(), torch.randn(1, n, n, 32).double()
    with torch.no_grad():
        new_nodes, new_edges = (x[0] for x in layer(nodes, edges))
        nodes, edges = nodes[0], edges[0]
        for i in range(n):
            attended = torch.cat([attend(layer.attention, nodes, edges, i, head) for head in range(4)])
            gathered = layer.attention.attention_linear(layer.attention.attention_output(attended))
            state = layer.node_norm1(nodes[i] + gathered)
            expected = layer.node_norm2(state + layer.node_feed2(gelu(layer.node_feed1(state))))
            torch.testing.assert_close(new_nodes[i], expected, atol=1e-9, rtol=0)
        for i in range(n):
            for j in range(n):
                mixed = layer.edge_pair(torch.cat([edges[i, j], edges[j, i]]))
                mixed = mixed + layer.edge_source(new_nodes[j]) + layer.edge_target(new_nodes[i])
                state = layer.edge_norm1(edges[i, j] + layer.edge_output(gelu(mixed)))
                expected = layer.edge_norm2(state + layer.edge_feed2(gelu(layer.edge_feed1(state))))
                torch.testing.assert_close(new_edges[i, j], expected, atol=1e-9, rtol=0)


def attend(layer, nodes: Tensor, edges: Tensor, i: int, head: int) -> Tensor:
    """What one head of node i gathers over all nodes."""
    dims = slice(32 * head, 32 * (head + 1))
    scores, values = [], []
    for j in range(len(nodes)):
        q, k, v = (
            part[dims]
            for part in (
                *layer.node_qkv(nodes[i])[:128].split(128),
                *layer.node_qkv(nodes[j])[128:].split(128),
            )
        )
        edge_q, edge_k, shift, scale = (part[dims] for part in layer.edge_qkss(edges[i, j]).split(128))
        scores.append((q + edge_q) @ (k + edge_k) / math.sqrt(32))
        values.append(scale * v + shift)
    weights = torch.stack(scores).exp()
    return (weights / weights.sum()) @ torch.stack(values)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def test_siren_follows_the_published_recipe():
    torch.manual_seed(0)
    siren = Siren()
    for i, fan_in in enumerate([2, 32]):
        bound = math.sqrt(6 / fan_in) / 30
        assert siren.layers[i].weight.abs().max() <= bound
        assert siren.layers[i].weight.abs().max() > 0.9 * bound
        assert not siren.layers[i].bias.any()
    assert siren.layers[2].weight.abs().max() <= 1 / math.sqrt(32)  # PyTorch's own initialization
    with torch.no_grad():
        siren.layers[2].weight.zero_()
        siren.layers[2].bias.fill_(0.25)
    torch.testing.assert_close(siren(pixel_coordinates()), torch.full((784, 1), 0.75))


def test_pixel_coordinates_run_along_rows():
    coordinates = pixel_coordinates().reshape(28, 28, 2)
    assert coordinates[0, 0].tolist() == [-1, -1]
    assert coordinates[0, 27].tolist() == [1, -1]
    assert coordinates[27, 0].tolist() == [-1, 1]


def test_fit_one_takes_steps_of_adam():
    """Three steps, with Adam's formula written out."""
    torch.manual_seed(0)
    image, siren = torch.rand(28, 28, dtype=torch.float64), Siren().double()
    initial = {name: tensor.clone() for name, tensor in siren.state_dict().items()}
    fitted = fit_one(image, 3, 1e-3, initial)

    mean = {name: torch.zeros_like(p) for name, p in siren.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in siren.named_parameters()}
    for t in range(1, 4):
        error = siren(pixel_coordinates().double()).reshape(28, 28) - image
        gradients = torch.autograd.grad((error**2).sum() / 784, list(siren.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(siren.named_parameters(), gradients, strict=True):
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.999 * square[name] + 0.001 * gradient**2
                direction = mean[name] / (1 - 0.9**t)
                parameter -= 1e-3 * direction / (torch.sqrt(square[name] / (1 - 0.999**t)) + 1e-8)
    for name, parameter in siren.named_parameters():
        torch.testing.assert_close(fitted[name], parameter.detach(), atol=1e-9, rtol=0)
        assert not torch.equal(fitted[name], initial[name])


def test_fit_one_stops_at_40_db():
    torch.manual_seed(0)
    image, initial = torch.full((28, 28), 0.3), Siren().state_dict()
    fitted = fit_one(image, 2_000, 1e-3, initial)
    assert 40 <= psnr(fitted, image) < 41
    again = fit_one(image, 100, 1e-3, fitted)
    assert all(torch.equal(again[name], fitted[name]) for name in fitted)


def psnr(parameters: dict[str, Tensor], image: Tensor) -> float:
    siren = Siren()
    siren.load_state_dict(parameters)
    with torch.no_grad():
        mse = (siren(pixel_coordinates()).reshape(28, 28) - image).square().mean()
    return -10 * math.log10(mse)
