"""The parameter graph: one edge for every parameter (Lim et al., Graph Metanetworks, section 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch_geometric.data import Data

from ngcore.graph.pyg import ROLES, check_finite, index_of
from ngcore.graph.structure import Block
from ngcore.graph.wiring import NeuralGraph, Wiring

# What the integers in `Data` stand for. New edge types go before "other", the last: stored models index into these.
NODE_TYPES = (*ROLES, "bias", "gamma", "beta")
EDGE_TYPES = (
    "linear", "convolution", "embedding", "bias", "gamma", "beta", "residual", "flatten", "product", "other",
)  # fmt: skip


def to_parameter_graph(graph: NeuralGraph) -> Data:
    """One network as a parameter graph: as many edges with a parameter as the network has parameters.

    - A linear weight is an edge from neuron to neuron; a kernel is parallel edges, one per position.
    - A layer's biases are edges from its bias node.
    - A norm has no neurons of its own: γ and β are edges from its gamma and its beta node to the neurons that it
      normalizes. All other products with one parameter per neuron (layer scale, PReLU) are read in the same way.
      `merged_groups` says where that would be ambiguous; there, γ are edges from neuron to neuron.
    - Residual connections, flattenings and products of neurons are edges with the value 1, each of their own type.

    Where it differs from the paper, because the wiring knows more than the paper's hand-written rules:

    - Attention. The paper has one attention neuron per inner dimension, with q, k and v as three parallel edges from
      an input neuron. Here q, k and v have neurons of their own, and product edges lead over one score node per head
      to what is gathered, as the network computes it. The parameter edges are as many.
    - A parameter that is used twice has edges in both places; `edge_tied` marks the second ones.
    - A flattening has a virtual neuron per channel and location, with an edge of the value 1 from its channel.
    - A class token or a positional embedding is edges of type "embedding" from a node per position.

    Attributes:
        edge_index: (2, edges) source and target.
        edge_attr: (edges, 1) the parameter, or 1 where an edge has none.
        edge_layer: (edges,) layer of the target.
        edge_type: (edges,) index into `EDGE_TYPES`.
        edge_position: (edges, 3) place in the kernel, counted from its centre, aligned at the last axis: (0, row,
            column) for 2D kernels; 0 for edges without a kernel.
        edge_weighted: (edges,) whether an edge has a parameter.
        edge_tied: (edges,) whether an earlier edge has the same parameter.
        layer: (nodes,) counted from 0 at the input; bias, gamma and beta nodes have their neurons' layer.
        position: (nodes,) place in its layer of an input or output neuron; 0 for all others.
        node_type: (nodes,) index into `NODE_TYPES`.

    Raises:
        ValueError: the graph is of a batch of networks, holds NaN or infinity, or has a kernel of more than three axes.
    """
    if graph.edges[0].dim() != 3:
        raise ValueError("to_parameter_graph takes one network: index the batch first, as in graph[0]")
    check_finite(graph.wiring.groups, graph.wiring.blocks, graph.nodes, graph.edges)
    builder = _Builder(graph)
    for block, edges in zip(graph.wiring.blocks, graph.edges, strict=True):
        builder.add_block(block, edges)
    for g, nodes in enumerate(graph.nodes):
        builder.add_bias(g, nodes)
    return builder.data()


def merged_groups(wiring: Wiring) -> dict[int, list[Block]]:
    """Groups that do nothing but scale the neurons of others, each its own, and the blocks that do it.

    They merge with what they scale, unless that would hide what the network computes: where two norms scale the same
    neurons, or where something computed from the neurons is added to their scaled values.
    """
    into = [[block for block in wiring.blocks if block.target == g] for g in range(len(wiring.groups))]
    scaling = [[block for block in blocks if block.kind == "normalization"] for blocks in into]
    ancestors = _ancestors(wiring)
    scaled = Counter(source for blocks in scaling for source in {block.source for block in blocks})
    merged = {}
    for g, blocks in enumerate(scaling):
        sources = {block.source for block in blocks}
        added = [block for block in into[g] if block.kind == "residual"]
        if (
            len(blocks) + len(added) == len(into[g])
            and _is_one_to_one(wiring, blocks, wiring.groups[g].size)
            and all(scaled[source] == 1 for source in sources)
            and not any(sources & ancestors[block.source] for block in added)
        ):
            merged[g] = blocks
    return merged


def _ancestors(wiring: Wiring) -> list[set[int]]:
    """For every group, itself and all groups that it is computed from."""
    ancestors = [{g} for g in range(len(wiring.groups))]
    changed = True
    while changed:  # blocks are nearly in the order of the computation: two rounds or three
        before = sum(map(len, ancestors))
        for block in wiring.blocks:
            ancestors[block.target] |= ancestors[block.source]
        changed = sum(map(len, ancestors)) != before
    return ancestors


def _is_one_to_one(wiring: Wiring, blocks: Sequence[Block], size: int) -> bool:
    """Whether each of a group's neurons has an edge of these blocks, and a source that it shares with no other."""
    if not blocks:
        return False
    pairs = torch.cat([wiring.edge_index(block) for block in blocks], dim=1)
    return all(len(ends) == len(torch.unique(ends)) == size for ends in pairs)


@dataclass
class _Builder:
    """Collects nodes and edges; `home` (neurons,) is the neuron that stands for each, its own or the one it scales."""

    graph: NeuralGraph
    home: Tensor = field(init=False)
    merged: dict[int, list[Block]] = field(init=False)
    layer: list[int] = field(init=False)
    kind: list[int] = field(init=False)
    scales: dict[int, int] = field(default_factory=dict)
    index: list[Tensor] = field(default_factory=list)
    columns: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        wiring = self.graph.wiring
        self.merged = merged_groups(wiring)
        self.home = torch.arange(wiring.num_nodes)
        for blocks in self.merged.values():  # in the order of the computation: a norm of a norm finds the first neuron
            for source, target in map(wiring.edge_index, blocks):
                self.home[target] = self.home[source]
        self.layer = [group.layer for group in wiring.groups for _ in range(group.size)]
        roles = torch.tensor([ROLES.index(group.role) for group in wiring.groups for _ in range(group.size)])
        # A neuron whose norm is the network's output is an output neuron.
        output = ROLES.index("output")
        own = roles.clone()
        own[self.home[roles == output]] = output
        self.kind = own.tolist()

    def add_node(self, kind: str, layer: int) -> int:
        self.layer.append(layer)
        self.kind.append(NODE_TYPES.index(kind))
        return len(self.kind) - 1

    def add_edges(self, index: Tensor, values: Tensor, kind: str, weighted: bool, tied: bool, offsets: Tensor) -> None:
        """Parallel edges for each pair of `index` (2, pairs), with `values` (pairs, features) at `offsets`."""
        pairs, features = values.shape
        count = pairs * features
        self.index.append(index[:, :, None].expand(-1, -1, features).flatten(1))
        self.columns.append(
            (
                values.reshape(-1, 1),
                torch.full((count,), index_of(kind, EDGE_TYPES)),
                offsets.repeat(pairs, 1),
                torch.full((count,), weighted),
                torch.full((count,), tied),
            )
        )

    def add_block(self, block: Block, edges: Tensor) -> None:
        source, target = self.graph.wiring.edge_index(block)
        source, target = self.home[source], self.home[target]
        kind = block.kind
        if kind == "normalization":
            kind = "gamma"
            if block.target in self.merged:
                source = torch.full_like(target, self.scale_node(block.target))
        offsets = kernel_offsets(block.kernel) if block.kernel else kernel_offsets((edges.shape[-1],), centred=False)
        index = torch.stack([source, target])
        self.add_edges(index, edges.flatten(0, 1), kind, block.weight is not None, block.tied, offsets)

    def scale_node(self, g: int) -> int:
        """The gamma node of a merged group, one for all of its blocks."""
        if g not in self.scales:
            first = self.home[self.graph.wiring.offsets[g]]
            self.scales[g] = self.add_node("gamma", self.layer[int(first)])
        return self.scales[g]

    def add_bias(self, g: int, nodes: Tensor) -> None:
        wiring, group = self.graph.wiring, self.graph.wiring.groups[g]
        if group.bias is None:
            return
        target = self.home[wiring.offsets[g] : wiring.offsets[g + 1]]
        kind = "beta" if g in self.merged else "bias"
        source = torch.full_like(target, self.add_node(kind, self.layer[int(target[0])]))
        self.add_edges(torch.stack([source, target]), nodes, kind, True, group.tied, kernel_offsets(()))

    def positions(self) -> Tensor:
        """Places of input and output neurons in their groups; a norm's, where that is the output."""
        wiring = self.graph.wiring
        places = torch.zeros(len(self.kind), dtype=torch.long)
        for g, group in enumerate(wiring.groups):
            if group.role != "hidden":
                places[self.home[wiring.offsets[g] : wiring.offsets[g + 1]]] = torch.arange(group.size)
        return places

    def data(self) -> Data:
        """Leave out the neurons that merged with others, and the numbers of their layers."""
        kept = torch.ones(len(self.kind), dtype=torch.bool)
        kept[: len(self.home)] = self.home == torch.arange(len(self.home))
        layer = torch.unique(torch.tensor(self.layer)[kept], return_inverse=True)[1]
        index = (kept.cumsum(0) - 1)[torch.cat(self.index, dim=1)]
        names = ("edge_attr", "edge_type", "edge_position", "edge_weighted", "edge_tied")
        columns = (torch.cat(column) for column in zip(*self.columns, strict=True))
        return Data(
            edge_index=index,
            edge_layer=layer[index[1]],
            layer=layer,
            position=self.positions()[kept],
            node_type=torch.tensor(self.kind)[kept],
            num_nodes=int(kept.sum()),
            **dict(zip(names, columns, strict=True)),
        ).to(self.graph.edges[0].device)


def kernel_offsets(kernel: Sequence[int], centred: bool = True) -> Tensor:
    """Coordinates of a kernel's entries, (entries, 3), in row-major order: from the centre, or from the first one.

    Raises:
        ValueError: the kernel has more than three axes.
    """
    if len(kernel) > 3:
        raise ValueError(f"a kernel has at most three axes, not {tuple(kernel)}")
    sizes = (1,) * (3 - len(kernel)) + tuple(kernel)
    axes = [torch.arange(n) - ((n - 1) // 2 if centred else 0) for n in sizes]
    return torch.cartesian_prod(*axes)
