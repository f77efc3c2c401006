"""The bench's plain builders of neural graphs: the same graphs as those of traced networks."""

import pytest
import torch

from ngcore.bench.graph import GRAPH_ROWS, plain_dense, plan_of
from ngcore.bench.harness import DoesNotFitError
from ngcore.bench.networks import INR, WildParkCNN
from ngcore.graph import trace
from ngcore.reference.graph import dense, dense_bytes, edge_list, plan_gpt2, plan_resnet, plan_vit

NETWORKS = {
    "inr": lambda: (INR((2, 5, 4, 3)), torch.zeros(5, 2)),
    "wild_park": lambda: (
        WildParkCNN((3, 4, 6, 3, 5), (5, 3, 3, 3), (2, 1, 1, 1), (2, 1, 1, 1), (-1, -1, 0, 1), classes=2),
        torch.zeros(1, 3, 17, 17),
    ),
}


def tiny_resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 5, 6, 7], depths=[2] * 4, layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config), torch.zeros(1, 3, 65, 65), plan_resnet


def tiny_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=12, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    return model, torch.zeros(1, 3, 12, 12), lambda state: plan_vit(state, layers=2, heads=2)


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=7, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), torch.arange(5).unsqueeze(0), lambda s: plan_gpt2(s, layers=2, heads=2)


def edges(data) -> list[list[float]]:
    """The edges with their features, in an order of their own."""
    return sorted(torch.cat([data.edge_index.T.to(data.edge_attr), data.edge_attr], 1).tolist())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("build", [dense, edge_list])
def test_same_graph_as_traced(network, build):
    module, example = NETWORKS[network]()
    state = module.state_dict()
    state["layers.0.weight"][0, 0] = 0.0  # an edge all the same
    expected, found = trace(module, example).graph(state).to_data(), build(plan_of(network, module, state))
    assert torch.equal(found.x, expected.x)
    assert edges(found) == edges(expected)


@pytest.mark.parametrize("network", [tiny_resnet, tiny_vit, tiny_gpt2])
def test_large_architectures_have_the_same_neurons_and_edges(network):
    module, example, plan = network()
    state = module.state_dict()
    graph = trace(module, example).graph(state)
    found = edge_list(plan(state), parallel=True)
    assert found.num_nodes == graph.wiring.num_nodes
    rows = torch.cat([values.flatten() for values in graph.edges])
    assert torch.equal(found.edge_attr.flatten().sort().values, rows.sort().values)
    assert torch.equal(found.x.flatten().sort().values, torch.cat(graph.nodes).flatten().sort().values)


def test_kernel_positions_as_edges_of_their_own():
    module, _ = NETWORKS["wild_park"]()
    plan = plan_of("wild_park", module, module.state_dict())
    together, parallel = edge_list(plan), edge_list(plan, parallel=True)
    assert parallel.edge_attr.shape == (parallel.num_edges, 1)
    assert parallel.num_edges > together.num_edges
    torch.testing.assert_close(parallel.edge_attr.sum(), together.edge_attr.sum())


def test_dense_matrices_are_refused_where_they_do_not_fit(monkeypatch):
    monkeypatch.setattr("ngcore.bench.graph.DENSE_LIMIT_MB", 0.01)
    with pytest.raises(DoesNotFitError, match="needs 0 MB") as caught:
        plain_dense("inr", 1)
    plan = plan_of("inr", INR(), INR().state_dict())
    assert caught.value.needed_mb == dense_bytes(plan) / (1 << 20) == 67**2 * 5 / (1 << 20)


def test_titles_fit_the_table():
    assert max(len(row.name) for row in GRAPH_ROWS) <= 54
