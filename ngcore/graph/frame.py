"""What the graphs of several wirings have in common, so that one model reads them all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ngcore.graph.pyg import LinearForm, largest_kernel
from ngcore.graph.structure import Group
from ngcore.graph.wiring import Wiring


@dataclass(frozen=True)
class Frame:
    """What the graphs of several wirings have in common, so that one model reads them all.

    Args:
        window: kernels are centred in it.
        inputs, outputs: the largest numbers of input and output neurons, each with an embedding of its own.
        layers: the largest number of hidden layers, each with an embedding of its own.
        activations: names of the hidden neurons' activations. Where "other" is among them it stands for all that are
            not; else such networks do not fit.
        locations: places in space from which channels are flattened, each with an embedding of its own.
        linear: where weights without a kernel lie: at the window's centre, as in a 1x1 convolution ("convolution"), or
            at its first place ("linear"; paper, section 2.2). Edges without a parameter stay at the centre.
        kinds: the kinds of nodes that are no neurons.
        input_shape: of one input of the networks, None where it is not known or not the same for all.
    """

    window: tuple[int, ...]
    inputs: int
    outputs: int
    layers: int
    activations: tuple[str, ...]
    locations: int = 0
    linear: LinearForm = "convolution"
    kinds: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, wirings: Iterable[Wiring]) -> Frame:
        """The smallest frame that holds all of these wirings."""
        wirings = tuple(wirings)
        groups = [group for wiring in wirings for group in wiring.groups]
        hidden = [group for group in groups if group.role == "hidden" and group.kind == "neuron"]
        return cls(
            window=largest_kernel([block for wiring in wirings for block in wiring.blocks]),
            inputs=max(_neurons(wiring, "input") for wiring in wirings),
            outputs=max(_neurons(wiring, "output") for wiring in wirings),
            layers=max((group.layer for group in hidden), default=0),
            activations=tuple(sorted({group.activation for group in hidden})),
            locations=1 + max((place for group in groups for place in group.locations or ()), default=-1),
            kinds=tuple(sorted({group.kind for group in groups} - {"neuron"})),
            input_shape=shapes.pop() if len(shapes := {_input_shape(wiring) for wiring in wirings}) == 1 else None,
        )

    @property
    def features(self) -> int:
        """Numbers on an edge."""
        return math.prod(self.window)

    @property
    def slots(self) -> int:
        """Rows of statistics: for every kind of node one per layer, from the inputs to the outputs."""
        return (self.layers + 2) * (1 + len(self.kinds))

    @property
    def positions(self) -> int:
        """Rows of positional embeddings."""
        return self._first_of_kinds + len(self.kinds) * (self.layers + 2)

    @property
    def _first_of_kinds(self) -> int:
        return self.inputs + self.layers + self.outputs + self.locations

    def slot(self, group: Group, kind: str = "neuron") -> int:
        """Row of the statistics of a layer's biases, or of the weights from nodes of a kind to it: 0 for inputs, the
        last of the kind for outputs."""
        own = {"input": 0, "output": self.layers + 1}.get(group.role, group.layer)
        return own if kind == "neuron" else own + (1 + self.kinds.index(kind)) * (self.layers + 2)

    def positions_of(self, wiring: Wiring) -> list[int]:
        """Row of the positional embedding of every node: one per input and output neuron, one per hidden layer, one per
        location of flattened channels, one per layer of every other kind of node."""
        rows: list[int] = []
        first = {"input": 0, "output": self.inputs + self.layers}
        for group in wiring.groups:
            if group.kind != "neuron":
                row = self._first_of_kinds + self.kinds.index(group.kind) * (self.layers + 2) + group.layer
                rows += [row] * group.size
            elif group.locations is not None:
                rows += [self.inputs + self.layers + self.outputs + place for place in group.locations]
            elif group.role == "hidden":
                rows += [self.inputs + max(0, group.layer - 1)] * group.size
            else:
                rows += range(first[group.role], first[group.role] + group.size)
                first[group.role] += group.size
        return rows

    def activation(self, group: Group) -> int:
        """Row of the activation embedding; the last one for what is no hidden neuron."""
        if group.role != "hidden" or group.kind != "neuron":
            return len(self.activations)
        return self.activations.index(group.activation if group.activation in self.activations else "other")

    def check(self, wiring: Wiring) -> None:
        """Raise a ValueError that says why a wiring does not fit."""
        for role, most in (("input", self.inputs), ("output", self.outputs)):
            if (count := _neurons(wiring, role)) > most:
                raise ValueError(f"a network has {count} {role} neurons, the frame {most}")
        for group in wiring.groups:
            where = f"layer {group.layer} of {[g.size for g in wiring.groups]}"
            if group.kind not in ("neuron", *self.kinds):
                raise ValueError(f"{where} is a {group.kind} node, and the frame has none: make it of such wirings")
            hidden = group.role == "hidden" and group.kind == "neuron"
            if hidden and not {group.activation, "other"} & set(self.activations):
                known = ", ".join(self.activations)
                raise ValueError(f"unknown activation {group.activation!r} in {where}; the frame has {known}")
            if hidden and group.layer > self.layers:
                raise ValueError(f"{where} is deeper than the frame's {self.layers} hidden layers")
            if group.locations and max(group.locations) >= self.locations:
                count = 1 + max(group.locations)
                raise ValueError(f"{where} is flattened from {count} locations, the frame has {self.locations}")


def _input_shape(wiring: Wiring) -> tuple[int, ...] | None:
    """Shape of one input: of the example without its batch axis, or the number of input neurons of an MLP."""
    shapes = [step.arguments[1] for step in wiring.steps if step.operator == "input"]
    if shapes:
        return (tuple(shapes[0][1:]) or tuple(shapes[0])) if len(shapes) == 1 else None
    return None if any(block.kernel for block in wiring.blocks) else (_neurons(wiring, "input"),)


def _neurons(wiring: Wiring, role: str) -> int:
    return sum(group.size for group in wiring.groups if group.role == role)
