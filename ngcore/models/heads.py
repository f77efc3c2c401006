"""What a metanetwork is asked for: scores or numbers for a whole network, or numbers for every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph
from ngcore.graph.batch import GraphBatch
from ngcore.graph.frame import Frame


@dataclass(frozen=True)
class Scores:
    """Numbers for a whole network, such as class scores or a predicted accuracy, from the states of its output neurons.

    Output neurons that a network lacks, beside others of a collection, have zeros for a state.
    """

    count: int = 1


@dataclass(frozen=True)
class PerParameter:
    """Numbers for every parameter, which permute with the network's neurons: a graph of the same wiring."""

    count: int = 1


Head = Scores | PerParameter
Answer = Float[Tensor, "networks count"] | NeuralGraph | tuple[NeuralGraph, ...]


def require_head(head: object) -> None:
    """Raise a TypeError that says what a head is."""
    if not isinstance(head, Scores | PerParameter):
        raise TypeError(f"the second argument says what is asked for: Scores(10) or PerParameter(), not {head!r}")


class ScoresHead(nn.Sequential):
    """An MLP with ReLU on the states of some neurons side by side, (networks, neurons * width).

    Args:
        widths: of the states and the hidden layers.
    """

    def __init__(self, neurons: int, head: Scores, widths: Sequence[int]) -> None:
        sizes = [neurons * widths[0], *widths[1:], head.count]
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            layers += [nn.ReLU()] * (i > 0) + [nn.Linear(sizes[i], sizes[i + 1])]
        super().__init__(*layers)


class PerParameterHead(nn.Module):
    """A Linear of the last states of nodes, and one of those of edges with numbers for every place of the window."""

    def __init__(self, frame: Frame, head: PerParameter, node_width: int, edge_width: int) -> None:
        super().__init__()
        self.node = nn.Linear(node_width, head.count)
        self.edge = nn.Linear(edge_width, frame.features * head.count)

    def forward(
        self,
        batch: GraphBatch,
        nodes: Float[Tensor, "copies nodes node_numbers"],
        edges: Sequence[Float[Tensor, "_ _ _ edge_numbers"]],
    ) -> NeuralGraph | tuple[NeuralGraph, ...]:
        """From what `node` and `edge` give: one graph where all networks share a wiring, else one for each of
        `batch.graphs`."""
        found = batch.on_graphs(nodes, edges)
        return found[0] if batch.is_static else found


def rename_old(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give heads per parameter that were stored under earlier names their present ones, in place."""
    for old, new in (("node_head.", "head.node."), ("edge_head.", "head.edge.")):
        for name in [name for name in state_dict if name.startswith(prefix + old)]:
            state_dict[prefix + new + name.removeprefix(prefix + old)] = state_dict.pop(name)
