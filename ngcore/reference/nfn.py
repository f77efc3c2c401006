"""The NF-Layer term by term: the reference that `EquivariantLayer`, with means, is held against.

Layer i of the input network has weights W^i, from the neurons k of layer i - 1 to its own neurons j, and biases
b^i. A star is a mean over an index. The layer of Zhou et al. (2023a) for NP, biases included, is

    H(W)^i_jk = Σ_s (W^s_** + b^s_*) + (W^i_j* + W^(i+1)_*j + b^i_j) + (W^i_*k + W^(i-1)_k* + b^(i-1)_k) + W^i_jk + 1
    H(b)^i_j  = Σ_s (W^s_** + b^s_*) + (W^i_j* + W^(i+1)_*j + b^i_j) + 1

where every term has coefficients of its own: a matrix from the channels that it reads to those that it adds to.

With HNP the input is one neuron whose weights hold the channels of all input neurons, and the output is another. A
mean over one neuron is what it averages, so a term that keeps such a neuron's index would be there twice: it is left
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.baselines.weight_space import PermutationGroup, WeightSpace

Term = tuple[str, str, tuple[int, ...]]  # what it adds to, what it reads, the layers whose index it keeps
CONSTANT = "1"


@dataclass(frozen=True)
class PlainNFLayer:
    """The layer on networks with biases.

    Args:
        coefficients: of a term (channels out, channels in), of a constant (channels out,).

    Shapes: input and output are graphs with `width` channels per scalar, so nodes[g] (batch, size, width) and
        edges[b] (batch, targets, sources, positions * width); of the input group nothing is read.
    """

    wiring: Wiring
    group: PermutationGroup
    coefficients: Mapping[Term, Tensor]

    def __call__(self, graph: NeuralGraph) -> NeuralGraph:
        W, b = self._matrices(graph)
        new_biases, new_weights = [], []
        for i in W:
            weights = self._constant(f"W{i}") + self._everywhere(f"W{i}", W, b)[:, None, None]
            weights = weights + self._of_targets(f"W{i}", i, W, b)[:, :, None] + self._of_sources(i, W, b)[:, None]
            weights = weights + self._term(f"W{i}", f"W{i}", (i, i - 1), W[i])
            biases = self._constant(f"b{i}") + self._everywhere(f"b{i}", W, b)[:, None]
            biases = biases + self._of_targets(f"b{i}", i, W, b)
            # Channels that stood for neurons become neurons again.
            targets, sources = (self.wiring.groups[g].size for g in (i, i - 1))
            if self._single(i):
                weights = weights.unflatten(-1, (targets, -1)).squeeze(1).movedim(-2, 1)
                biases = biases.unflatten(-1, (targets, -1)).squeeze(1)
            if self._single(i - 1):
                weights = weights.unflatten(-1, (sources, -1)).squeeze(2)
            new_biases.append(biases)
            new_weights.append(weights)
        of_inputs = biases.new_zeros(len(biases), self.wiring.groups[0].size, biases.shape[-1])
        return NeuralGraph(self.wiring, (of_inputs, *new_biases), tuple(new_weights))

    def _single(self, layer: int) -> bool:
        """Whether the layer counts as one neuron."""
        return self.group == "HNP" and layer in (0, len(self.wiring.blocks))

    def _matrices(self, graph: NeuralGraph) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """W^i (batch, neurons j, neurons k, channels) and b^i (batch, neurons j, channels), by layer."""
        W, b = {}, {}
        for i, edges in enumerate(graph.edges, start=1):
            if self._single(i - 1):
                edges = edges.flatten(2).unsqueeze(2)
            if self._single(i):
                edges = edges.movedim(1, 2).flatten(2).unsqueeze(1)
            W[i], b[i] = edges, graph.nodes[i].flatten(1).unsqueeze(1) if self._single(i) else graph.nodes[i]
        return W, b

    def _constant(self, target: str) -> Float[Tensor, " channels"]:
        return self.coefficients[target, CONSTANT, ()]

    def _term(self, target: str, source: str, kept: tuple[int, ...], x: Tensor) -> Float[Tensor, "batch ..."]:
        """A term's part of the target's channels; 0 where the term is left out."""
        if any(map(self._single, kept)):
            return x.new_zeros(*x.shape[:-1], len(self._constant(target)))
        return torch.einsum("...c,dc->...d", x, self.coefficients[target, source, kept])

    def _everywhere(self, target: str, W: dict[int, Tensor], b: dict[int, Tensor]) -> Float[Tensor, "batch channels"]:
        weights = (self._term(target, f"W{s}", (), W[s].mean((1, 2))) for s in W)
        biases = (self._term(target, f"b{s}", (), b[s].mean(1)) for s in b)
        return sum(weights) + sum(biases)

    def _of_targets(
        self, target: str, i: int, W: dict[int, Tensor], b: dict[int, Tensor]
    ) -> Float[Tensor, "batch j channels"]:
        y = self._term(target, f"W{i}", (i,), W[i].mean(2)) + self._term(target, f"b{i}", (i,), b[i])
        return y + self._term(target, f"W{i + 1}", (i,), W[i + 1].mean(1)) if i + 1 in W else y

    def _of_sources(self, i: int, W: dict[int, Tensor], b: dict[int, Tensor]) -> Float[Tensor, "batch k channels"]:
        y = self._term(f"W{i}", f"W{i}", (i - 1,), W[i].mean(1))
        if i == 1:
            return y
        y = y + self._term(f"W{i}", f"W{i - 1}", (i - 1,), W[i - 1].mean(2))
        return y + self._term(f"W{i}", f"b{i - 1}", (i - 1,), b[i - 1])


def cut(space: WeightSpace, merged: Mapping[str, Tensor]) -> dict[Term, Tensor]:
    """The parameters of an `EquivariantLayer` on `space`, or their gradients, as coefficients of a `PlainNFLayer`."""
    own_name = {}
    for block in space.wiring.blocks:
        own_name[block.weight] = f"W{block.target}"
        own_name[space.wiring.groups[block.target].bias] = f"b{block.target}"
    found = {}
    for k, tie in enumerate(space.ties):
        names = [name for name in space.support if set(tie) <= set(space.support[name])]
        entries = torch.tensor([space.entries[name] for name in names])
        weight = merged[f"maps.{k}.weight"]
        width_out, width_in = (size // int(entries.sum()) for size in weight.shape)
        for target, rows in zip(names, weight.split((width_out * entries).tolist()), strict=True):
            for source, part in zip(names, rows.split((width_in * entries).tolist(), dim=1), strict=True):
                found[own_name[target], own_name[source], tie] = part
        if not tie:
            constants = merged[f"maps.{k}.bias"].split((width_out * entries).tolist())
            found |= {(own_name[name], CONSTANT, ()): part for name, part in zip(names, constants, strict=True)}
    return found
