"""Signs of neurons: where an activation is odd, a neuron with all of its weights negated computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ngcore.activations import ACTIVATIONS
from ngcore.graph import Block, Group, NeuralGraph, Wiring
from ngcore.graph.readings import needed_state
from ngcore.graph.steps import run_steps
from ngcore.graph.structure import Step

Signs = Mapping[int, Tensor]
"""By group, -1 or 1 for every neuron, (*batch, size, 1)."""


def canonical_signs(graph: NeuralGraph) -> NeuralGraph:
    """The same functions with hidden neurons negated where their bias is: of the 2^hidden networks that differ in signs
    alone one is left (where no bias is 0).

    With s a hidden neuron's sign, -1 or 1, its bias, its incoming and its outgoing weights are multiplied by s:
    f(s z) s = f(z) for odd f. Between neurons a network may move and average values: what else a traced one does is
    tried once, on random numbers.

    Raises:
        ValueError: names the neurons without a bias or with an activation that is not odd, or the operator that signs
            do not pass through: a maximum, a norm, a sum along edges without weights.
    """
    wiring = graph.wiring
    for group in (wiring.groups[g] for g in wiring.with_role("hidden")):
        if group.bias is None and group.locations is None:
            raise ValueError(f"the neurons of {_named(group)} have no canonical sign: that needs a bias")
    if wiring.steps:
        _require_signs_pass(graph)
    else:
        _require_layers(wiring)
    biases = (torch.where(x < 0, -1.0, 1.0).to(x) for x in graph.nodes)
    return negated(graph, dict(enumerate(biases)))


def negated(graph: NeuralGraph, signs: Signs) -> NeuralGraph:
    """Multiply biases and weights by the signs of hidden neurons; flattened channels keep theirs."""
    wiring = graph.wiring
    own = {g: signs[g] for g in wiring.with_role("hidden") if wiring.groups[g].bias is not None}
    for block in wiring.blocks:
        if block.kind == "flatten" and block.source in own:
            own[block.target] = own[block.source][..., _nodes(wiring, block.source, block.source_nodes), :]
    nodes = tuple(values * own[g] if g in own else values for g, values in enumerate(graph.nodes))
    edges = tuple(_negated(wiring, *both, own) for both in zip(wiring.blocks, graph.edges, strict=True))
    return replace(graph, nodes=nodes, edges=edges)


def _negated(wiring: Wiring, block: Block, values: Tensor, signs: Signs) -> Tensor:
    """A block's weights, (*batch, targets, sources of a target, features), times the signs at their ends."""
    if block.weight is None:
        return values
    if block.target in signs:
        values = values * signs[block.target][..., _nodes(wiring, block.target, block.target_nodes), :].unsqueeze(-2)
    if block.source in signs:
        sources = signs[block.source][..., _nodes(wiring, block.source, block.source_nodes), :]
        parts = values.unflatten(-3, (block.groups, -1)) * sources.unflatten(-2, (block.groups, 1, -1))
        values = parts.flatten(-4, -3)
    return values


def _nodes(wiring: Wiring, group: int, nodes: Sequence[int] | None) -> list[int]:
    return list(range(wiring.groups[group].size) if nodes is None else nodes)


def _named(group: Group) -> str:
    return f"'{group.where}' (activation {group.activation}, bias {group.bias})"


def _require_layers(wiring: Wiring) -> None:
    """Raise a ValueError that names a block without weights, or neurons whose activation is not odd."""
    for block in wiring.blocks:
        if block.kind not in ("linear", "convolution", "flatten"):
            raise ValueError(f"signs do not pass {block.kind} edges, as those to {_named(wiring.groups[block.target])}")
    for group in (wiring.groups[g] for g in wiring.with_role("hidden")):
        if group.activation not in ODD:
            odd = ", ".join(ODD)
            raise ValueError(f"the neurons of {_named(group)} have no canonical sign: that needs one of {odd}")


ODD = [name for name, activation in ACTIVATIONS.items() if activation.odd]
PASSED: WeakSet[Step] = WeakSet()
"""Last steps of the wirings through which signs pass."""


@torch.no_grad()
def _require_signs_pass(graph: NeuralGraph) -> None:
    """Try signs on random numbers, and name the operator where they are lost.

    Raises:
        ValueError: the network is another function with other signs.
    """
    wiring = graph.wiring
    if wiring.steps[-1] in PASSED:
        return
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch = graph.edges[0].dim() - 3
    others = {name: values.flatten(0, batch - 1)[0] if batch else values for name, values in graph.others.items()}
    others = {name: x.cpu().double() if x.is_floating_point() else x.cpu() for name, x in others.items()}
    state = {name: 0.5 * normal(*shape) for name, shape in wiring.shapes.items()}
    state |= {alias: state[name] for alias, name in wiring.aliases}
    first = wiring.graph(state | others)
    signs = {g: normal(group.size, 1).sign() for g, group in enumerate(wiring.groups)}
    inputs = [normal(*step.arguments[1]) for step in wiring.steps if step.operator == "input"]
    before, after = (run_steps(wiring.steps, needed_state(x), *inputs) for x in (first, negated(first, signs)))
    returned = [argument.step for argument in wiring.steps[-1].arguments]
    if not all(torch.allclose(before[i], after[i], 1e-9, 1e-9) for i in returned):
        raise _lost(wiring, before, after, signs)
    PASSED.add(wiring.steps[-1])


def _lost(wiring: Wiring, before: Sequence[Any], after: Sequence[Any], signs: Signs) -> ValueError:
    """The error that names the first operator whose result is not that of before with its neurons' signs."""
    hidden = {g: signs[g] if g in wiring.with_role("hidden") else signs[g].abs() for g in signs}
    for block in wiring.blocks:
        if block.kind == "flatten":
            hidden[block.target] = hidden[block.source][_nodes(wiring, block.source, block.source_nodes)]
    of_node = torch.cat([*hidden.values(), torch.ones(1, 1, dtype=torch.float64)]).flatten()  # last: what is no neuron
    for step, old, new in zip(wiring.steps, before, after, strict=False):
        numbers = isinstance(old, Tensor) and old.is_floating_point() and step.ids is not None
        if numbers and step.parameter is None and not torch.allclose(old * of_node[step.ids], new, 1e-9, 1e-9):
            where = step.where or "the network"
            return ValueError(f"signs of neurons do not pass through {step.operator} in '{where}': no canonical signs")
    return ValueError("signs of neurons do not pass through the network: no canonical signs")


class CanonicalSigns(nn.Module):
    """A model that reads every network in the one form of `canonical_signs`; it has the parameters of that model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.wiring = model, model.wiring

    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Take the training set's statistics, those of the canonical forms."""
        self.model.fit_normalization(canonical_signs(graph))

    def compile_parts(self) -> None:
        """Compile the parts that a training step spends its time in."""
        if hasattr(self.model, "compile_parts"):
            self.model.compile_parts()

    def forward(self, graph: NeuralGraph) -> Tensor:
        """What the model says of the canonical forms."""
        return self.model(canonical_signs(graph))
