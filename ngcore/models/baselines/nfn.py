"""Neural functional networks, NFN (Zhou et al., 2023a): NF-Layers with ReLU, for both of their permutation groups.

An NF-Layer adds, for every entry of a weight matrix, maps of the global means of all layers, of its row's and its
column's mean, of the means and biases that its neighbours hold for the same neurons, and of the entry itself, with
coefficients that the permutations exchange shared: every linear map that commutes with them, which is
`EquivariantLayer` with means. `ngcore.reference.nfn` writes it term by term, as the paper does.

NFN_HNP keeps input and output neurons apart by coefficients of their own; NFN_NP treats them like hidden ones and
distinguishes them by encodings. Of a convolution the neurons are channels, and a kernel's positions are channels of
the metanetwork.

There is no normalization between the layers: what enters is standardized, per weight matrix and per bias vector, and
three layers do not let it vanish. Only the head has batch norm, as all baselines' heads here do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.baselines.mlp import ParameterReader, perceptron
from ngcore.models.baselines.weight_space import EquivariantLayer, PermutationGroup, WeightSpace, poolings
from ngcore.models.encoder import fourier_features
from ngcore.models.kernels.dropout import dropout as drop

CHANNELS = (48, 48, 48)


class IOEncoding(nn.Module):
    """Learned vectors that distinguish the neurons of the input, and those of the output.

    Without them a network that commutes with NP cannot know which input or which class a weight belongs to. One vector
    per neuron and tensor, learned rather than sinusoidal: classes and coordinates have no order to carry over.

    Shapes: features and output: per support (batch, *sizes of the support, width * multiplicity).
    """

    def __init__(self, space: WeightSpace, width: int) -> None:
        super().__init__()
        ends = space.wiring.with_role("input", "output")
        self.tables = nn.ParameterDict()
        for i, (support, entries) in enumerate(zip(space.supports, space.multiplicity, strict=True)):
            if not set(support).isdisjoint(ends):
                sizes = [space.wiring.groups[g].size if g in ends else 1 for g in support]
                self.tables[str(i)] = nn.Parameter(torch.randn(*sizes, width * entries))

    def forward(self, features: Sequence[Float[Tensor, "batch ..."]]) -> list[Float[Tensor, "batch ..."]]:
        return [x + self.tables[str(i)] if str(i) in self.tables else x for i, x in enumerate(features)]


class NFStack(ParameterReader):
    """What both forms of NFN share: NF-Layers with ReLU.

    Args:
        group: "HNP" permutes hidden neurons, "NP" those of every layer.
        channels: per scalar of the input network, after each hidden layer.
        frequencies: of Gaussian Fourier features of every scalar; 0 reads the scalars themselves.
        sigma: standard deviation of the frequencies.
        io_encoding: with NP, distinguish input neurons, and output neurons, after the first layer.
        dropout: of the features after every ReLU.
    """

    def __init__(
        self,
        wiring: Wiring,
        *,
        group: PermutationGroup,
        channels: Sequence[int],
        frequencies: int,
        sigma: float,
        io_encoding: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(wiring)
        self.space = WeightSpace(wiring, group)
        self.dropout = dropout
        self.register_buffer("frequencies", torch.randn(frequencies) * sigma if frequencies else None)
        widths = [2 * frequencies or 1, *channels]
        self.layers = nn.ModuleList(EquivariantLayer(self.space, *pair, "mean") for pair in pairwise(widths))
        self.encoding = IOEncoding(self.space, channels[0]) if group == "NP" and io_encoding else None

    def features(self, graph: NeuralGraph) -> list[Float[Tensor, "batch ..."]]:
        """What the last hidden layer returns, per support (batch, *sizes of the support, channels * multiplicity)."""
        features = self.space.features(self.standardized_graph(graph))
        if self.frequencies is not None:
            features = [fourier_features(x.unsqueeze(-1), self.frequencies.unsqueeze(0)).flatten(-2) for x in features]
        for number, layer in enumerate(self.layers):
            features = layer(features)
            if number == 0 and self.encoding is not None:
                features = self.encoding(features)
            features = [drop(torch.relu(x), self.dropout, self.training) for x in features]
        return features


class NFN(NFStack):
    """Invariant NFN (Zhou et al., 2023a): NF-Layers, the mean of every tensor over its permuted neurons, an MLP.

    The defaults make a model of the other baselines' size: 505,866 parameters for ten classes of 2-32-32-1 INRs with
    HNP, 433,098 with NP.

    Args:
        dropout: in the head.
    """

    def __init__(
        self,
        wiring: Wiring,
        num_classes: int,
        *,
        group: PermutationGroup = "HNP",
        channels: Sequence[int] = CHANNELS,
        frequencies: int = 0,
        sigma: float = 3.0,
        io_encoding: bool = True,
        head_width: int = 256,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(
            wiring, group=group, channels=channels, frequencies=frequencies, sigma=sigma, io_encoding=io_encoding
        )
        pooled = channels[-1] * sum(self.space.multiplicity)
        self.head = perceptron([pooled, head_width, head_width, num_classes], dropout)

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        features = self.features(graph)
        pooled = [poolings(x, s, "mean")[()] for x, s in zip(features, self.space.supports, strict=True)]
        return self.head(torch.cat(pooled, dim=-1))


class EquivariantNFN(NFStack):
    """NFN with an output per parameter (Zhou et al., 2023a): NF-Layers, the last without ReLU.

    Its outputs are raw numbers, of standard deviation 0.1 at first, to be scaled and added to the parameters.

    The defaults make a model of the other methods' size: 353,815 parameters for one output on 2-32-32-1 INRs with HNP,
    292,710 with NP.

    Args:
        outputs: numbers per scalar of the input network.
        dropout: of the features after every ReLU; it treats neurons unalike, so training is equivariant without it.

    Shapes:
        output: nodes[g] (batch, size, outputs), zeros where group g has no biases;
            edges[b] (batch, targets, sources, positions * outputs), the outputs of a kernel's position side by side
    """

    def __init__(
        self,
        wiring: Wiring,
        outputs: int = 1,
        *,
        group: PermutationGroup = "HNP",
        channels: Sequence[int] = CHANNELS,
        frequencies: int = 0,
        sigma: float = 3.0,
        io_encoding: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            wiring,
            group=group,
            channels=channels,
            frequencies=frequencies,
            sigma=sigma,
            io_encoding=io_encoding,
            dropout=dropout,
        )
        self.outputs = outputs
        self.last = EquivariantLayer(self.space, channels[-1], outputs, "mean")

    def forward(self, graph: NeuralGraph) -> NeuralGraph:
        return self.space.graph(self.last(self.features(graph)), self.outputs)
