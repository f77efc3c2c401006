"""Signs of neurons: where an activation is odd, a neuron with all of its weights negated computes the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring

ODD = ("siren", "sine", "tanh", "erf", "softsign", "identity")  # f(-x) = -f(x)


def check_blocks(wiring: Wiring) -> None:
    """Raise a ValueError that names a block which is not one weight for every pair of neurons of two layers."""
    sizes = [group.size for group in wiring.groups]
    for block in wiring.blocks:
        ends = (block.source_nodes, block.source), (block.target_nodes, block.target)
        some = any(nodes is not None and len(nodes) < sizes[group] for nodes, group in ends)
        if some or block.groups > 1 or block.weight is None or block.kernel:
            name = block.weight or f"groups {block.source} -> {block.target}"
            raise ValueError(f"the {block.kind} block of {name} is not one weight for every pair of neurons")


def canonical_signs(graph: NeuralGraph) -> NeuralGraph:
    """The same functions of MLPs with hidden neurons negated where their bias is: of the 2^hidden networks that differ
    in signs alone one is left (where no bias is 0).

    With s a hidden neuron's sign, -1 or 1, its bias, its incoming and its outgoing weights are multiplied by s:
    f(s z) s = f(z) for odd f.

    Raises:
        ValueError: a wiring that was traced, which may do more than an MLP; a block as of `check_blocks`; names a group
            of hidden neurons whose activation is not odd, or that have no biases.
    """
    wiring, signs = graph.wiring, {}
    if wiring.steps:
        raise ValueError(
            "canonical signs are of MLPs, by `ngcore.graph.mlp`: what a traced network does may depend on signs"
        )
    check_blocks(wiring)
    for g in wiring.with_role("hidden"):
        group = wiring.groups[g]
        if group.activation not in ODD or group.bias is None:
            raise ValueError(
                f"the neurons of {group.where or f'group {g}'} (activation {group.activation}, bias {group.bias}) "
                f"have no canonical sign: that needs a bias and one of {', '.join(ODD)}"
            )
        signs[g] = torch.where(graph.nodes[g] < 0, -1.0, 1.0).to(graph.nodes[g])  # (*batch, size, 1)
    nodes = tuple(values * signs[g] if g in signs else values for g, values in enumerate(graph.nodes))
    edges = []
    for block, values in zip(wiring.blocks, graph.edges, strict=True):
        if block.target in signs:
            values = values * signs[block.target].unsqueeze(-2)
        if block.source in signs:
            values = values * signs[block.source].unsqueeze(-3)
        edges.append(values)
    return replace(graph, nodes=nodes, edges=tuple(edges))


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
