"""Biases as edges from nodes of their own (Lim et al., 2023), in place of features of the neurons they belong to."""

from __future__ import annotations

from dataclasses import replace

from ngcore.graph.structure import Block, Group, View
from ngcore.graph.wiring import Wiring


def bias_nodes(wiring: Wiring) -> Wiring:
    """The same network with a bias node per layer, whose value is 1 and whose edges are the layer's biases.

    The bias nodes are hidden groups of one node, behind the network's own groups. Parameters, their symmetry and what
    is not on the graph stay as they are. Steps of a traced wiring are left out: they speak of the old graph.

    Raises:
        ValueError: a bias has its place on the graph already, as a tied one has.
    """
    tied = [group.bias for group in wiring.groups if group.tied]
    if tied:
        raise ValueError(f"the biases {', '.join(tied)} belong to several layers: they can't be edges of one")
    groups = [replace(group, bias=None, view=None) for group in wiring.groups]
    before: dict[int, Block] = {}
    for target, group in enumerate(wiring.groups):
        if group.bias is None:
            continue
        stride, offset = (1, 0) if group.view is None else (group.view.stride[0], group.view.offset)
        view = View((1, group.size, 1), (0, stride, 0), offset)
        before[target] = Block(len(groups), target, group.bias, "linear", view)
        groups.append(Group(1, "hidden", group.layer - 1, "identity", where=group.where))
    blocks: list[Block] = []
    for block in wiring.blocks:  # a layer's bias before its weights: blocks stand in the order of computation
        blocks += [before.pop(block.target)] if block.target in before else []
        blocks.append(block)
    return replace(wiring, groups=tuple(groups), blocks=(*blocks, *before.values()), steps=())
