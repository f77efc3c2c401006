"""What must hold of the wiring of every network, as numbers that tests assert on."""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ngcore.graph import NeuralGraph


def randomized(module, seed=0, spread=0.3):
    """A module in float64, in evaluation mode, of which no two numbers agree; running statistics too."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, spread, generator=generator)
        for norm in module.modules():
            if getattr(norm, "running_var", None) is not None:
                norm.running_mean.normal_(0, spread, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
    return module


def in_float64(values):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


@torch.no_grad()
def outputs(module: nn.Module, state, inputs, keywords=None):
    """All numbers that the module returns with these weights, which it then keeps."""
    module.load_state_dict(state)
    found = tree_leaves(module(*inputs, **(keywords or {})))
    return torch.cat([x.double().flatten() for x in found if isinstance(x, torch.Tensor)])


def difference(expected, found):
    """Largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def random_permutations(wiring, generator=None):
    """An order of every hidden group, by group index."""
    return {g: torch.randperm(wiring.groups[g].size, generator=generator) for g in wiring.with_role("hidden")}


def permute(graph, orders):
    """A graph whose groups are in these orders, of inputs and outputs too, with any features.

    Only for blocks that connect whole groups; what keeps a network's function is `wiring.symmetry`.
    """
    nodes, edges = list(graph.nodes), list(graph.edges)
    for g, order in orders.items():
        nodes[g] = nodes[g].index_select(-2, order)
        for b, block in enumerate(graph.wiring.blocks):
            if block.target == g:
                edges[b] = edges[b].index_select(-3, order)
            if block.source == g:
                edges[b] = edges[b].index_select(-2, order)
    return NeuralGraph(graph.wiring, tuple(nodes), tuple(edges))


def times_placed(wiring):
    """How often each element of each parameter is on the graph, places of tied parameters counted once."""
    count = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in wiring.shapes.items()}
    for block in wiring.blocks:
        if block.weight is not None and not block.tied:
            seen = count[block.weight] if block.view is None else block.view(count[block.weight], 0)
            seen += 1
    for group in wiring.groups:
        if group.bias is not None and not group.tied:
            seen = count[group.bias] if group.view is None else group.view(count[group.bias], 0)
            seen += 1
    return count


def cyclic(factor):
    """For every copy of a factor the order that moves all of its elements by one place."""
    return torch.arange(factor.size).roll(1).expand(*factor.copies, factor.size)


def changes_alone(module, wiring, inputs, keywords=None):
    """By (parameter, factor): how much the outputs change when the factor permutes this parameter and no other."""
    state = copy.deepcopy(module.state_dict())
    expected = outputs(module, state, inputs, keywords)
    aliases = dict(wiring.aliases)
    found = {}
    for i, factor in enumerate(wiring.symmetry.factors):
        for name in factor.parameters:
            if name in aliases:
                continue
            own = wiring.symmetry.permute({name: state[name]}, {i: cyclic(factor)})[name]
            changed = {**state, name: own} | {alias: own for alias, owner in aliases.items() if owner == name}
            found[name, i] = difference(expected, outputs(module, changed, inputs, keywords))
    module.load_state_dict(state)
    return found
