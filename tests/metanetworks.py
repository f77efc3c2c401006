"""Models that standardize by the networks they read, and their answers network by network, for tests to compare."""

import torch

from ngcore.graph import NeuralGraph
from ngcore.graph.pyg import kernel_places
from ngcore.models import NGGNN, NGT, PerParameter, Scores
from ngcore.models.editing import outputs_first
from ngcore.reference.encoder import to_batch
from ngcore.reference.ng_gnn import PlainNGGNN
from ngcore.reference.ng_t import PlainNGT

HEADS = {"scores": Scores(3), "numbers per parameter": PerParameter(2)}
PLAIN = {NGGNN: PlainNGGNN, NGT: PlainNGT}


def random_batch(wiring, count=3, dtype=torch.float64):
    """Random networks of one wiring, by torch's global generator."""
    return wiring.graph({n: 0.3 * torch.randn(count, *s, dtype=dtype) for n, s in wiring.shapes.items()})


def everything(networks):
    return networks[torch.arange(len(networks))]


def fitted(model, networks, head, dtype=torch.float64, **options):
    """A model without dropout that standardizes by these networks' statistics."""
    torch.manual_seed(0)
    source = networks.wiring if isinstance(networks, NeuralGraph) else networks
    made = model(source, head, **{"dropout": 0.0, **options}).to(dtype)
    made.fit_normalization(networks)
    return made


def answers(model, networks):
    """What a model says of every network of a graph or a batch: names and tensors, permuted as parameters are."""
    found = model(networks)
    if isinstance(found, torch.Tensor):
        return [{"scores": row} for row in found]
    if isinstance(found, NeuralGraph):
        return by_network(found, networks)
    answer = {}
    for (rows, graph), own in zip(networks.graphs, found, strict=True):
        answer |= dict(zip(rows.tolist(), by_network(own, graph), strict=True))
    return [answer[i] for i in range(networks.num_networks)]


def by_network(numbers, graph):
    state = outputs_first(numbers, graph).state_dict()
    return [{name: values[:, i] for name, values in state.items()} for i in range(graph.num_networks)]


def plain_of(fast, head, **options):
    """The plain form of a model, with its weights."""
    plain = PLAIN[type(fast)](fast.frame, head, dropout=0.0, **options).to(fast.encoder.node_linear.weight)
    plain.load_state_dict(fast.state_dict())
    return plain


def plain_inputs(plain, graphs, frame):
    """Networks as a plain model reads them: NG-GNN all in one batch, NG-T wiring after wiring."""
    if isinstance(plain, PlainNGGNN):
        return to_batch(graphs, frame)
    return [to_batch([graph], frame) for graph in graphs]


def plain_answers(plain, graphs, frame):
    """`answers` of a plain model."""
    found = plain(plain_inputs(plain, graphs, frame))
    if isinstance(found, torch.Tensor):
        return [{"scores": row} for row in found]
    answer, (nodes, edges) = [], found
    for graph in graphs:
        wiring = graph.wiring
        sizes = [wiring.edge_index(block).shape[1] for block in wiring.blocks]
        for i in range(graph.num_networks):
            own_nodes, nodes = nodes.tensor_split([wiring.num_nodes])
            own_edges, edges = edges.tensor_split([sum(sizes)])
            on_blocks = []
            for block, values, like in zip(wiring.blocks, own_edges.split(sizes), graph.edges, strict=True):
                of_places = values.unflatten(1, (frame.features, -1))[:, kernel_places(block.kernel, frame.window)]
                on_blocks.append(of_places.flatten(1).view(1, *like.shape[1:3], -1))
            on_groups = own_nodes.unsqueeze(0).split([group.size for group in wiring.groups], dim=1)
            answer += by_network(NeuralGraph(wiring, on_groups, tuple(on_blocks)), graph[i : i + 1])
    assert len(nodes) == len(edges) == 0
    return answer


def assert_same(found, wanted, tolerance=1e-9):
    assert len(found) == len(wanted)
    for own, other in zip(found, wanted, strict=True):
        assert own.keys() == other.keys()
        for name, values in own.items():
            torch.testing.assert_close(
                values, other[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


def assert_same_gradients(fast, plain, found, wanted, tolerance=1e-9):
    """Of the sum of squares of all answers."""
    for own in (found, wanted):
        sum(values.square().sum() for network in own for values in network.values()).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in fast.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=tolerance, atol=tolerance)


def distance(one, other):
    return max((values - other[name]).abs().max().item() for name, values in one.items())
