"""Example networks of notebook 00: what is shown of them is true of them, and the controls can fail."""

from math import factorial

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from ngcore.graph import trace
from ngcore.tasks import neural_graphs as task

matplotlib.use("Agg")


@pytest.fixture(params=["residual", "language"])
def example(request, generator):
    """(module, wiring, inputs, the group's order by hand)"""
    if request.param == "residual":
        module, order = task.ResidualNet(channels=3, inside=4), factorial(3) * factorial(4)
        inputs = torch.randn(2, 1, 7, 7, generator=generator, dtype=torch.float64)
    else:
        module, inputs = task.LanguageModel(5, 6, 2, 8), torch.randint(5, (3, 4), generator=generator)
        order = factorial(6) * factorial(2) * factorial(3) ** 4 * factorial(8)
    module = task.randomized(module, generator)
    return module, trace(module, inputs), inputs, order


def test_only_all_parameters_together_keep_the_function(example, generator):
    module, wiring, inputs, order = example
    assert wiring.symmetry.order == order
    table = task.symmetry_check(module, wiring, [inputs], generator)
    assert table["same function"].tolist() == [True] + [False] * (len(table) - 1)
    assert len(table) > len(wiring.symmetry.factors)


def test_every_number_has_one_place(example):
    module, wiring, _, _ = example
    places = task.places(wiring)
    assert len(places) == sum(parameter.numel() for parameter in module.parameters())
    assert (places == 1).all()


def test_tables_list_every_group_and_block(example):
    module, wiring, _, _ = example
    graph = wiring.graph(module.state_dict())
    assert task.groups_table(graph)["neurons"].sum() == wiring.num_nodes
    assert task.blocks_table(graph)["edges"].sum() == graph.to_data().num_edges
    assert len(task.symmetry_table(wiring)) == len(wiring.symmetry.factors)


def test_the_matrix_is_drawn_with_one_label_per_group(example):
    module, wiring, _, _ = example
    fig, ax = plt.subplots()
    image = task.draw_matrix(wiring.graph(module.state_dict()), ax)
    assert image.get_array().shape == (wiring.num_nodes, wiring.num_nodes)
    assert len(ax.get_xticks()) == len(wiring.groups)
    plt.close(fig)


def test_a_residual_connection_ties_the_channels_that_it_adds():
    wiring = trace(task.ResidualNet(channels=3, inside=4, skip=False), torch.randn(2, 1, 7, 7))
    assert wiring.symmetry.order == factorial(3) * factorial(4) * factorial(3)


def test_the_forward_pass_on_the_graph_is_the_modules(generator):
    module = task.randomized(task.ResidualNet(), generator)
    inputs = torch.randn(2, 1, 7, 7, generator=generator, dtype=torch.float64)
    wiring = trace(module, inputs)
    assert task.simulation_error(module, wiring, [inputs]) < task.UNCHANGED
    table = task.sizes_table({"residual": wiring.graph(module.state_dict())})
    assert (table["parameter graph", "of them with a parameter"] == table["", "parameters"]).all()


def test_digits_are_images_from_0_to_1():
    digits = task.digits(2)
    assert digits.shape == (2, 1, 28, 28)
    assert digits.dtype == torch.float64
    assert (digits.min(), digits.max()) == (0, 1)
