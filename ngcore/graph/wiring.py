"""The wiring of a network: which neurons there are and which parameter connects which of them; and, with weights bound
to it, the neural graph.

A wiring is read once per architecture; `Wiring.graph` then binds any number of networks' weights to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import get_args

from torch import Tensor
from torch_geometric.data import Data

from ngcore.graph.pyg import Direction, Flatten, LinearForm, to_data
from ngcore.graph.states import Entries, NetworkState
from ngcore.graph.structure import Block, Group, Role, Step, View, edge_index, offsets
from ngcore.graph.symmetry.group import Symmetry

MOST_SIZES = 12  # of one role's groups that a representation lists


@dataclass(frozen=True)
class Wiring:
    """Groups of neurons and the blocks of edges between them. Hashable, so that it can key a cache.

    Attributes:
        parameters: name and shape of every parameter on the graph.
        aliases: further names under which parameters occur in the state dict, with the first one.
        others: entries of the state dict that are not on the graph: running statistics, what no operator reads.
        symmetry: the permutations that keep the network's function.
        steps: the operators around neurons and edges, for a forward pass on the graph; empty for a wiring by hand.
    """

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()
    symmetry: Symmetry = field(default_factory=lambda: Symmetry({}), compare=False, repr=False)
    steps: tuple[Step, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Index of each group's first node in the whole graph, and after them the number of nodes."""
        return offsets(self.groups)

    @property
    def num_nodes(self) -> int:
        return self.offsets[-1]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the input network, by name, in the order of its layers."""
        return dict(self.parameters)

    def with_role(self, *roles: Role) -> tuple[int, ...]:
        """Indices of the groups that have one of these roles."""
        return tuple(i for i, group in enumerate(self.groups) if group.role in roles)

    def graph(self, state_dict: NetworkState | Sequence[NetworkState]) -> NeuralGraph:
        """Bind weights to the wiring, as views (paper, equation 1); a list of networks is copied into one stack.

        Names may have the prefixes of DataParallel and torch.compile, which a warning names and the graph leaves out.

        Shapes:
            state_dict: every parameter with its own shape, or all of them behind the same batch axes; or a list of
                such, which get a first axis.

        Raises:
            ValueError: names the parameter that is missing, unknown, of another shape or of integers, the two names
                of one parameter that have different values, or the network of a list that differs from the first.
        """
        state, batch = Entries(self.shapes, dict(self.aliases), self.others).read(state_dict)
        first = next(iter(state[name] for name in self.shapes))
        nodes = tuple(self._node_features(group, state, first, batch) for group in self.groups)
        edges = tuple(self._edge_features(block, state, first, batch) for block in self.blocks)
        return NeuralGraph(self, nodes, edges, {name: state[name] for name in self.others if name in state})

    def _node_features(
        self, group: Group, state_dict: Mapping[str, Tensor], first: Tensor, batch: tuple[int, ...]
    ) -> Tensor:
        if group.bias is None:
            return first.new_zeros(1).expand(*batch, group.size, 1)
        bias = state_dict[group.bias]
        return (bias if group.view is None else group.view(bias, len(batch))).unsqueeze(-1)

    def _edge_features(
        self, block: Block, state_dict: Mapping[str, Tensor], first: Tensor, batch: tuple[int, ...]
    ) -> Tensor:
        if block.weight is None:
            return first.new_ones(1).expand(*batch, *self._ends(block), 1)
        weight = state_dict[block.weight]
        if block.view is None:
            return weight.unsqueeze(-1)
        seen = block.view(weight, len(batch)).flatten(len(batch), len(batch) + 1)
        return seen.flatten(len(batch) + 2) if len(block.view.size) > 3 else seen.unsqueeze(-1)

    def _ends(self, block: Block) -> tuple[int, int]:
        """Targets of a block, and sources of each of them."""
        targets = self.groups[block.target].size if block.target_nodes is None else len(block.target_nodes)
        sources = self.groups[block.source].size if block.source_nodes is None else len(block.source_nodes)
        return targets, sources // block.groups

    @cached_property
    def num_edges(self) -> int:
        return sum(targets * sources for targets, sources in map(self._ends, self.blocks))

    @cached_property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def __repr__(self) -> str:
        return f"Wiring: {self._summary()}"

    def _summary(self) -> str:
        """Counts, and a line for each role: the sizes of its groups where they are few, and their activations."""
        kinds = ", ".join(dict.fromkeys(block.kind for block in self.blocks))
        lines = [
            f"{self.num_nodes:,} neurons in {len(self.groups)} groups, {self.num_edges:,} edges ({kinds}), "
            f"{self.num_parameters:,} parameters"
        ]
        for role in get_args(Role):
            groups = [self.groups[g] for g in self.with_role(role)]
            if groups:
                lines.append(f"  {role}: {_sizes([group.size for group in groups])}{_activations(groups)}")
        return "\n".join(lines)

    def edge_index(self, block: Block) -> Tensor:
        """Source and target of every edge of a block, (2, edges), in the order of its features."""
        return edge_index(self.groups, block)


def _sizes(sizes: Sequence[int]) -> str:
    if len(sizes) <= MOST_SIZES:
        return ", ".join(f"{size:,}" for size in sizes)
    return f"{len(sizes)} groups of {min(sizes):,} to {max(sizes):,}"


def _activations(groups: Sequence[Group]) -> str:
    names = ", ".join(dict.fromkeys(group.activation for group in groups))
    return "" if names == "identity" else f" ({names})"


@dataclass(frozen=True)
class NeuralGraph:
    """Biases on nodes and weights on edges (paper, equation 1), kept as one dense tensor per group and block.

    Shapes:
        nodes[g]: (*batch, size of group g, features)
        edges[b]: (*batch, targets of block b, sources of a target, features)
        others: what the wiring does not place on the graph, e.g. running statistics, as it came
    """

    wiring: Wiring
    nodes: tuple[Tensor, ...]
    edges: tuple[Tensor, ...]
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> NeuralGraph:
        """The same wiring with `function` applied to every tensor, e.g. to index, move or cast them."""
        nodes, edges = tuple(map(function, self.nodes)), tuple(map(function, self.edges))
        return NeuralGraph(self.wiring, nodes, edges, self.others)

    def __getitem__(self, index: object) -> NeuralGraph:
        """Index the batch axes of every tensor."""
        others = {name: values[index] for name, values in self.others.items()}
        return replace(self.map(lambda tensor: tensor[index]), others=others)

    def __repr__(self) -> str:
        batch = self.nodes[0].shape[:-2]
        count = " x ".join(f"{n:,}" for n in batch) + " networks" if batch else "one network"
        like = self.nodes[0]
        return f"NeuralGraph of {count}, {like.dtype} on {like.device}\n  {self.wiring._summary()}"

    @property
    def num_networks(self) -> int:
        """Length of the first batch axis."""
        return self.edges[0].shape[0]

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters, exactly as they were bound: the inverse of `Wiring.graph`."""
        state: dict[str, Tensor] = {}
        for block, edges in zip(self.wiring.blocks, self.edges, strict=True):
            if block.weight is not None and not block.tied:
                self._give_back(state, block.weight, block.view, edges)
        for group, nodes in zip(self.wiring.groups, self.nodes, strict=True):
            if group.bias is not None and not group.tied:
                self._give_back(state, group.bias, group.view, nodes)
        state = {name: state[name] for name in self.wiring.shapes}
        state.update((alias, state[name]) for alias, name in self.wiring.aliases)
        return {**state, **self.others}

    def _give_back(self, state: dict[str, Tensor], name: str, view: View | None, values: Tensor) -> None:
        """Write features to where they came from; a whole parameter comes back as the view that it is."""
        if view is None:
            state[name] = values.squeeze(-1)
            return
        shape = self.wiring.shapes[name]
        batch = values.shape[: values.dim() - 3] if len(view.size) > 1 else values.shape[: values.dim() - 2]
        if name not in state:
            state[name] = values.new_empty(*batch, *shape)
        view(state[name], len(batch)).copy_(values.reshape(*batch, *view.size))

    def to_data(
        self,
        *,
        window: Sequence[int] | None = None,
        linear: LinearForm = "linear",
        direction: Direction = "forward",
        flatten: Flatten = "layer",
    ) -> Data:
        """One network as torch_geometric `Data`: see `ngcore.graph.pyg.to_data` for options and attributes."""
        return to_data(
            self.wiring.groups,
            self.wiring.blocks,
            self.nodes,
            self.edges,
            window=window,
            linear=linear,
            direction=direction,
            flatten=flatten,
        )
