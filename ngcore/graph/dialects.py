"""Other graphs of the same networks, as maps from wirings to wirings: views, batches, `state_dict` and the symmetry of
the parameters stay.

- `bias_nodes`: biases are edges from nodes of their own (Lim et al., 2023) instead of features of their neurons.
- `parameter_wiring`: the parameter graph of graph metanetworks (Lim et al., 2024): norms, too, have nodes of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch_geometric.data import Data

from ngcore.graph.pyg import ROLES, check_finite, index_of
from ngcore.graph.structure import Block, Group, NodeKind, View
from ngcore.graph.wiring import NeuralGraph, Wiring

# What the integers in `Data` stand for. New edge types go before "other", the last: stored models index into these.
NODE_TYPES = (*ROLES, "bias", "gamma", "beta")
EDGE_TYPES = (
    "linear", "convolution", "embedding", "bias", "gamma", "beta", "residual", "flatten", "product", "other",
)  # fmt: skip


def bias_nodes(wiring: Wiring) -> Wiring:
    """The same network with a bias node per layer, whose value is 1 and whose edges are the layer's biases.

    Bias nodes are hidden groups of one node, behind the network's own groups. Steps of a traced wiring are left out:
    they speak of the old graph.
    """
    return _with_nodes(wiring, {}, scale="normalization")


def parameter_wiring(wiring: Wiring) -> Wiring:
    """The parameter graph: one edge for every parameter (Lim et al., Graph Metanetworks, section 2).

    - A linear weight is an edge from neuron to neuron; a kernel is parallel edges, one per position, kept as features.
    - A layer's biases are edges from its bias node.
    - A norm has no neurons of its own: γ and β are edges from its gamma and its beta node to the neurons that it
      normalizes. All other products with one parameter per neuron (layer scale, PReLU) are read in the same way.
      `merged_groups` says where that would be ambiguous; there, γ are edges from neuron to neuron.
    - Residual connections, flattenings and products of neurons are edges with the value 1, each of their own kind.

    Where it differs from the paper, because the wiring knows more than the paper's hand-written rules:

    - Attention. The paper has one attention neuron per inner dimension, with q, k and v as three parallel edges from
      an input neuron. Here q, k and v have neurons of their own, and product edges lead over one score node per head
      to what is gathered, as the network computes it. The parameter edges are as many.
    - A parameter that is used twice has edges in both places; `tied` marks the second ones.
    - A flattening has a virtual neuron per channel and location, with an edge of the value 1 from its channel.
    - A class token or a positional embedding is edges of kind "embedding" from a node per position.
    """
    return _with_nodes(wiring, merged_groups(wiring), scale="gamma")


def merged_groups(wiring: Wiring) -> dict[int, list[Block]]:
    """Groups that do nothing but scale the neurons of others, each its own, and the blocks that do it.

    They merge with what they scale, unless that would hide what the network computes: where two norms scale the same
    neurons, or where something computed from the neurons is added to their scaled values.
    """
    into: list[list[Block]] = [[] for _ in wiring.groups]
    for block in wiring.blocks:
        into[block.target].append(block)
    scaling = [[block for block in blocks if block.kind == "normalization"] for blocks in into]
    scaled = Counter(source for blocks in scaling for source in {block.source for block in blocks})
    ancestors = _ancestors(wiring)

    def merges(g: int) -> bool:
        sources = {block.source for block in scaling[g]}
        added = [block for block in into[g] if block.kind == "residual"]
        return (
            len(scaling[g]) + len(added) == len(into[g])
            and _is_one_to_one(wiring, scaling[g], wiring.groups[g].size)
            and all(scaled[source] == 1 for source in sources)
            and not any(sources & ancestors[block.source] for block in added)
        )

    return {g: scaling[g] for g in range(len(wiring.groups)) if merges(g)}


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


def _with_nodes(wiring: Wiring, merged: Mapping[int, list[Block]], scale: str) -> Wiring:
    """The graph in which `merged` groups are those that they scale, and biases and scales come from nodes; other scales
    are edges of the kind `scale`."""
    homes = _Homes.of(wiring, merged)
    groups = homes.kept_groups()
    gammas = {g: len(groups) + i for i, g in enumerate(merged)}  # one gamma node for all of a norm's blocks
    groups += [homes.node(g, "gamma") for g in merged]
    before: dict[int, list[Block]] = {}
    for g, group in enumerate(wiring.groups):
        if group.bias is not None:
            kind: NodeKind = "beta" if g in merged else "bias"
            view = group.view or View((group.size,), (1,), 0)
            groups.append(homes.node(g, kind))
            own = View((1, *view.size, 1), (0, *view.stride, 0), view.offset)
            block = Block(len(groups) - 1, g, group.bias, kind, own, tied=group.tied)
            before[g] = list(homes.moved(block, None, homes.nodes(g)))
    blocks: list[Block] = []
    for block in wiring.blocks:  # a layer's bias before its weights: blocks stand in the order of computation
        blocks += before.pop(block.target, [])
        if block.target in merged and block.kind == "normalization":
            size, stride = block.view.size, block.view.stride
            view = View((1, size[0], 1, *size[3:]), (0, stride[0], 0, *stride[3:]), block.view.offset)
            own = replace(block, source=gammas[block.target], kind="gamma", view=view, groups=1)
            blocks += homes.moved(own, None, homes.nodes(block.target, block.target_nodes))
        else:
            ends = homes.nodes(block.source, block.source_nodes), homes.nodes(block.target, block.target_nodes)
            kind = scale if block.kind == "normalization" else block.kind
            blocks += homes.moved(replace(block, kind=kind), *ends)
    blocks += [block for left in before.values() for block in left]
    return replace(wiring, groups=tuple(groups), blocks=tuple(blocks), steps=())


@dataclass(frozen=True)
class _Homes:
    """Which neuron stands for each neuron of a wiring, its own or the one that it scales: `home` (neurons,)."""

    wiring: Wiring
    merged: Mapping[int, list[Block]]
    home: Tensor
    place: dict[int, int]  # of the groups that stay, among them
    layer: dict[int, int]  # their layers, counted anew where whole layers merged

    @classmethod
    def of(cls, wiring: Wiring, merged: Mapping[int, list[Block]]) -> _Homes:
        home = torch.arange(wiring.num_nodes)
        for blocks in merged.values():  # in the order of the computation: a norm of a norm finds the first neuron
            for source, target in map(wiring.edge_index, blocks):
                home[target] = home[source]
        kept = [g for g in range(len(wiring.groups)) if g not in merged]
        layers = sorted({wiring.groups[g].layer for g in kept})
        layer = {g: layers.index(wiring.groups[g].layer) for g in kept}
        return cls(wiring, merged, home, {g: i for i, g in enumerate(kept)}, layer)

    def group_of(self, nodes: Tensor) -> Tensor:
        return torch.bucketize(nodes, torch.tensor(self.wiring.offsets[1:]), right=True)

    def nodes(self, g: int, nodes: Sequence[int] | None = None) -> Tensor:
        """The neurons that stand for some of a group's, counted over the whole wiring."""
        own = torch.arange(self.wiring.groups[g].size) if nodes is None else torch.tensor(list(nodes))
        return self.home[self.wiring.offsets[g] + own]

    def kept_groups(self) -> list[Group]:
        """The groups that stay, without biases; what a norm of them is, an output or an activation, is theirs."""
        found = {g: replace(group, bias=None, view=None, tied=False) for g, group in enumerate(self.wiring.groups)}
        for g in self.merged:
            own = self.wiring.groups[g]
            for target in self.group_of(self.nodes(g)).unique().tolist():
                role = "output" if own.role == "output" else found[target].role
                activation = found[target].activation if own.activation == "identity" else own.activation
                found[target] = replace(found[target], role=role, activation=activation)
        return [replace(found[g], layer=self.layer[g]) for g in self.place]

    def node(self, g: int, kind: NodeKind) -> Group:
        """A node of a group's layer."""
        layer = self.layer[int(self.group_of(self.nodes(g)[:1]))]
        return Group(1, "hidden", layer, where=self.wiring.groups[g].where, kind=kind)

    def moved(self, block: Block, sources: Tensor | None, targets: Tensor) -> Iterator[Block]:
        """A block between the neurons that stand for its own, cut where these are of several groups.

        `sources` is None for a block from a node that has been made.
        """
        pieces = [(block, sources, targets.view(block.groups, -1))]
        if sources is not None:
            pieces = [(block, sources.view(block.groups, -1), targets.view(block.groups, -1))]
        for own, some, others in (cut for piece in pieces for cut in self._cut(*piece)):
            source = own.source if some is None else int(self.group_of(some.flatten()[:1]))
            target = int(self.group_of(others.flatten()[:1]))
            ends = {"target": self.place[target], "target_nodes": self._within(target, others)}
            if some is not None:
                ends |= {"source": self.place[source], "source_nodes": self._within(source, some)}
            yield replace(own, **ends)

    def _cut(
        self, block: Block, sources: Tensor | None, targets: Tensor
    ) -> Iterator[tuple[Block, Tensor | None, Tensor]]:
        """Cut a block along its parts where it has several, else along targets and sources, where groups change."""
        of_target = self.group_of(targets)
        of_source = None if sources is None else self.group_of(sources)
        if block.groups > 1:
            keys = of_target[:, :1] if of_source is None else torch.cat([of_target[:, :1], of_source[:, :1]], dim=1)
            for a, b in _runs(keys):
                yield _narrowed(block, 0, a, b), None if sources is None else sources[a:b], targets[a:b]
            return
        for a, b in _runs(of_target.T):
            rows = _narrowed(block, 1, a, b)
            if sources is None:
                yield rows, None, targets[:, a:b]
                continue
            for c, d in _runs(of_source.T):
                yield _narrowed(rows, 2, c, d), sources[:, c:d], targets[:, a:b]

    def _within(self, g: int, nodes: Tensor) -> range | tuple[int, ...] | None:
        """Places in a group; None for all in order."""
        own = (nodes.flatten() - self.wiring.offsets[g]).tolist()
        if own == list(range(own[0], own[0] + len(own))):
            return None if len(own) == self.wiring.groups[g].size else range(own[0], own[0] + len(own))
        return tuple(own)


def _runs(keys: Tensor) -> list[tuple[int, int]]:
    """Begin and end of every run of equal rows."""
    changes = (torch.nonzero((keys[1:] != keys[:-1]).any(1)).flatten() + 1).tolist()
    return list(zip([0, *changes], [*changes, len(keys)], strict=True))


def _narrowed(block: Block, axis: int, start: int, stop: int) -> Block:
    """Some of a block's parts (axis 0), targets (1) or sources (2)."""
    view = block.view
    if view is None and block.weight is None:
        return replace(block, groups=stop - start) if axis == 0 else block
    if view is None:
        return block
    view = view.narrow(axis, start, stop - start)
    return replace(block, view=view, groups=stop - start) if axis == 0 else replace(block, view=view)


def to_parameter_graph(graph: NeuralGraph) -> Data:
    """One network's parameter graph as torch_geometric `Data`: as many edges with a parameter as it has parameters.

    `parameter_wiring` says what is a node and an edge; here the positions of kernels are parallel edges.

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
    wiring = parameter_wiring(graph.wiring)
    own = wiring.graph(graph.state_dict())
    columns = [_parallel(wiring, block, edges) for block, edges in zip(wiring.blocks, own.edges, strict=True)]
    index, *values = (torch.cat(column, dim=-1 if i == 0 else 0) for i, column in enumerate(zip(*columns, strict=True)))
    layer = torch.tensor([group.layer for group in wiring.groups for _ in range(group.size)])
    names = ("edge_attr", "edge_type", "edge_position", "edge_weighted", "edge_tied")
    types = [group.role if group.kind == "neuron" else group.kind for group in wiring.groups]
    places = [range(group.size) if group.role != "hidden" else [0] * group.size for group in wiring.groups]
    return Data(
        edge_index=index,
        edge_layer=layer[index[1]],
        layer=layer,
        position=torch.tensor([place for own in places for place in own]),
        node_type=torch.tensor(
            [NODE_TYPES.index(t) for t, group in zip(types, wiring.groups, strict=True) for _ in range(group.size)]
        ),
        num_nodes=wiring.num_nodes,
        **dict(zip(names, values, strict=True)),
    ).to(graph.edges[0].device)


def _parallel(wiring: Wiring, block: Block, edges: Tensor) -> tuple[Tensor, ...]:
    """A block's edges, one for every feature: ends, value, type, place in the kernel, whether weighted and tied."""
    features = edges.shape[-1]
    pairs = edges.shape[:-1].numel()
    offsets = kernel_offsets(block.kernel) if block.kernel else kernel_offsets((features,), centred=False)
    count = pairs * features
    return (
        wiring.edge_index(block)[:, :, None].expand(-1, -1, features).flatten(1),
        edges.reshape(-1, 1),
        torch.full((count,), index_of(block.kind, EDGE_TYPES)),
        offsets.repeat(pairs, 1),
        torch.full((count,), block.weight is not None),
        torch.full((count,), block.tied),
    )


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
