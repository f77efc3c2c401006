"""Editing INRs the plain way: every network's parameters are changed and rendered by themselves, in a loop.

It states `ngcore.models.Editor` and the rendering of what it makes independently; parameters carry the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import Wiring
from ngcore.reference.inr import FREQUENCY, IMAGE_SIDE, pixel_coordinates

INITIAL_SCALE = 0.01


class PlainEditor(nn.Module):
    """New parameter = old parameter + scale * number, with a learned scale per layer, of weights and of biases apart.

    Args:
        metanetwork: a plain model with numbers for every parameter.
        wiring: of INRs with two sine layers.
    """

    def __init__(self, metanetwork: nn.Module, wiring: Wiring) -> None:
        super().__init__()
        self.metanetwork, self.wiring = metanetwork, wiring
        num_layers = len(wiring.blocks)
        self.node_scale = nn.Parameter(torch.full((1 + num_layers,), INITIAL_SCALE))  # the first of the input, unused
        self.edge_scale = nn.Parameter(torch.full((num_layers,), INITIAL_SCALE))

    def forward(
        self, inputs: object, networks: Sequence[Mapping[str, Tensor]]
    ) -> Float[Tensor, "outputs batch side side"]:
        """Images of the edited networks.

        Shapes:
            inputs: the networks as the metanetwork reads them
            networks: the parameters of each, `layers.<i>.weight` (out, in) and `layers.<i>.bias` (out,)
        """
        return torch.stack([torch.stack([render(one) for one in each]) for each in self.edit(inputs, networks)])

    def edit(self, inputs: object, networks: Sequence[Mapping[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
        """Parameters of the edited networks: `[k][n]` is what the k-th numbers make of the n-th network."""
        numbers = by_parameter(self.wiring, *self.metanetwork(inputs))
        outputs = next(iter(numbers.values())).shape[-1]
        return [
            [
                {name: old + self.scale(name) * numbers[name][n, ..., k] for name, old in network.items()}
                for n, network in enumerate(networks)
            ]
            for k in range(outputs)
        ]

    def scale(self, name: str) -> Float[Tensor, ""]:
        _, layer, kind = name.split(".")
        return self.edge_scale[int(layer)] if kind == "weight" else self.node_scale[int(layer) + 1]


def by_parameter(
    wiring: Wiring, nodes: Float[Tensor, "all_nodes k"], edges: Float[Tensor, "all_edges k"]
) -> dict[str, Float[Tensor, "batch *shape k"]]:
    """Numbers for the nodes and edges of several MLPs of one wiring, cut into those of each parameter."""
    nodes, edges = nodes.unflatten(0, (-1, wiring.num_nodes)), edges.unflatten(0, (-1, wiring.num_edges))
    numbers, first = {}, 0
    for block in wiring.blocks:
        rows, columns = wiring.shapes[block.weight]
        numbers[block.weight] = edges[:, first : first + rows * columns].unflatten(1, (rows, columns))
        first += rows * columns
        own = slice(wiring.offsets[block.target], wiring.offsets[block.target + 1])
        numbers[wiring.groups[block.target].bias] = nodes[:, own]
    return numbers


def render(parameters: Mapping[str, Tensor]) -> Float[Tensor, "side side"]:
    """The image that one INR draws, as grey values; the forward pass of `ngcore.reference.inr.Siren`."""
    x = pixel_coordinates().to(parameters["layers.0.weight"])
    for i in range(2):
        x = torch.sin(FREQUENCY * F.linear(x, parameters[f"layers.{i}.weight"], parameters[f"layers.{i}.bias"]))
    x = F.linear(x, parameters["layers.2.weight"], parameters["layers.2.bias"]) + 0.5
    return x.reshape(IMAGE_SIDE, IMAGE_SIDE)
