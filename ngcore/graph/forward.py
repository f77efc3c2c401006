"""Many networks of one wiring run at once: every neuron's activation, and the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from ngcore.activations import function_of
from ngcore.graph.readings import Plan, flat_state, plan_of
from ngcore.graph.steps import run_steps
from ngcore.graph.wiring import NeuralGraph


def activations(
    graph: NeuralGraph, inputs: Float[Tensor, "points ..."]
) -> list[Float[Tensor, "*batch neurons points"]]:
    """Every neuron's activation at the given inputs, by one batched forward pass (paper, equation 2).

    A wiring made by `mlp` runs by the names of its activations. One that was traced runs its own steps, over pieces of
    as many points as the example had: a neuron's activation is the last value that it takes before edges read it,
    averaged over positions. Neurons that no edge enters and that are no inputs are bias nodes: they are 1.

    Shapes:
        inputs: (points, inputs), or (points, channels, height, width) for images: of the example's axes those before
            its neurons are one.
        result[g]: (*batch, size of group g, points).

    Raises:
        ValueError: the network can't be run: names the operator, group or shape.
    """
    if not graph.wiring.steps:
        return by_names(graph, inputs)
    plan = plan_of(graph)
    plan.require_values(graph.wiring)
    (found,) = run(graph, plan, inputs, lambda results: (plan.means(results),))
    sizes = [group.size for group in graph.wiring.groups]
    return [x.mT for x in found.split(sizes, -1)]


def outputs(graph: NeuralGraph, inputs: Float[Tensor, "points ..."]) -> Tensor | tuple[Tensor, ...]:
    """What the networks return for the given inputs; a tuple where that is several tensors.

    Shapes:
        inputs: see `activations`.

    Raises:
        ValueError: the network can't be run: names the operator, group or shape.
    """
    if not graph.wiring.steps:
        return by_names(graph, inputs)[-1].mT
    plan = plan_of(graph)
    returned = [argument.step for argument in graph.wiring.steps[-1].arguments]
    found = run(graph, plan, inputs, lambda results: tuple(plan.by_point(results[i]) for i in returned))
    return found[0] if len(found) == 1 else found


def by_names(
    graph: NeuralGraph, points: Float[Tensor, "points inputs"]
) -> list[Float[Tensor, "*batch neurons points"]]:
    """The activations of MLPs, layer by layer: whole layers, one weight an edge.

    Raises:
        ValueError: names the block of another kind, or the activation that the table does not have.
    """
    groups, first = graph.wiring.groups, graph.edges[0]
    for block in graph.wiring.blocks:
        if block.kind not in ("linear", "bias") or block.weight is None:
            raise ValueError(
                f"without a network's steps only linear layers can be run, and {block.weight or block.kind} is a "
                f"{block.kind} block: read the wiring with `trace(module, inputs)`"
            )
    batch = first.shape[:-3]
    sums: list[Tensor | None] = [None] * len(groups)
    values = [points.T.expand(*batch, *points.T.shape)]
    values += [first.new_ones(1).expand(*batch, group.size, len(points)) for group in groups[1:]]
    for b, (block, edges) in enumerate(zip(graph.wiring.blocks, graph.edges, strict=True)):
        product = edges.squeeze(-1) @ values[block.source]
        before = sums[block.target]
        sums[block.target] = product if before is None else before + product
        if all(later.target != block.target for later in graph.wiring.blocks[b + 1 :]):
            activation = function_of(groups[block.target].activation)
            values[block.target] = activation(sums[block.target] + graph.nodes[block.target])
    return values


def run(
    graph: NeuralGraph, plan: Plan, inputs: Tensor, pick: Callable[[list[Any]], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What is picked from all networks' results, each (points of a piece, *rest), for all points."""
    if inputs.shape[1:] != plan.example[plan.batch_axes :]:
        raise ValueError(f"inputs have shape {tuple(inputs.shape)}; the wiring needs (points, {plan.input_shape})")
    count = len(inputs)
    padding = inputs.new_zeros(-count % plan.points, *inputs.shape[1:])
    pieces = torch.cat([inputs, padding]).view(-1, *plan.example)

    def one(state: Mapping[str, Tensor], piece: Tensor) -> tuple[Tensor, ...]:
        return pick(run_steps(graph.wiring.steps, state, piece))

    found = vmap(vmap(one, (None, 0)), (0, None))(flat_state(graph), pieces)
    batch = graph.edges[0].shape[:-3]
    return tuple(x.reshape(*batch, -1, *x.shape[3:]).narrow(len(batch), 0, count) for x in found)
