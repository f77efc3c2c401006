"""The input network's own computation, done on its neural graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngcore.graph.forward import outputs
from ngcore.graph.steps import call
from ngcore.graph.structure import Reference, Step
from ngcore.graph.tracing.rules.parameters import form_of_convolution
from ngcore.graph.tracing.values import NO_NEURON
from ngcore.graph.wiring import NeuralGraph


class SimulationError(ValueError):
    """A computation that the graph does not express; the message names the operator and where it is."""


def simulate(graph: NeuralGraph, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The network's forward pass in evaluation mode, computed with the numbers on the graph's edges and nodes.

    Every weight is found by the two neurons that it connects and every bias by its neuron: sums, residual
    connections, products and norms run along edges, and an edge that is missing is an error. Between them values are
    pooled, moved and transformed as the wiring's steps say; running statistics come from `graph.others`.

    Shapes:
        graph: one network, without batch axes.
        inputs: as the examples with which the wiring was read; (points, inputs) for a wiring made by `mlp`.
        result: what the network returns, a tuple of tensors where it is several.

    Raises:
        SimulationError: an operator's edges can't be followed, e.g. of class tokens and embeddings.
        ValueError: a batch of networks, or inputs of other shapes than the examples'.
    """
    if graph.edges[0].dim() != 3:
        raise ValueError("simulate takes one network: index the batch first, as in simulate(graph[0], points)")
    if not graph.wiring.steps:
        (points,) = inputs
        return outputs(graph, points)
    simulation = Simulation(graph)
    returned = simulation(*inputs)
    return returned[0] if len(returned) == 1 else returned


class Edges:
    """Features of some blocks' edges, found by the neurons that they connect."""

    def __init__(self, graph: NeuralGraph, blocks: Sequence[int]) -> None:
        wiring = graph.wiring
        self.count = wiring.num_nodes
        self.sources, self.targets = torch.cat([wiring.edge_index(wiring.blocks[b]) for b in blocks], 1)
        self.keys, order = (self.sources * self.count + self.targets).sort(stable=True)
        self.features = torch.cat([graph.edges[b].flatten(0, 1) for b in blocks])[order]

    def __call__(self, sources: Tensor, targets: Tensor) -> Tensor:
        """Features of the edges between neurons: (*broadcast of both, features)."""
        wanted = sources * self.count + targets
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        if not torch.equal(self.keys[place], wanted):
            raise SimulationError("neurons that it connects have no edge")
        return self.features[place]

    def single(self, sources: Tensor, targets: Tensor) -> Tensor:
        """Edges of one feature: a number each."""
        if self.features.shape[-1] != 1:
            raise SimulationError("its edges have several features")
        return self(sources, targets).squeeze(-1)

    def factor(self, sources: Tensor, targets: Tensor) -> Tensor:
        """What values are multiplied with on their way: 1 where they stay with their neuron or belong to none."""
        sources, targets = torch.broadcast_tensors(sources, targets)
        moves = (sources != targets) & (sources != NO_NEURON) & (targets != NO_NEURON)
        factor = self.features.new_ones(sources.shape)
        if moves.any():
            factor[moves] = self.single(sources[moves], targets[moves])
        return factor


class Simulation:
    """One run over the steps of a network.

    Attributes:
        results: what every step came to; None for parameters, whose numbers are on the graph.
    """

    def __init__(self, graph: NeuralGraph) -> None:
        self.graph, self.wiring = graph, graph.wiring
        self.biases = torch.cat([nodes[:, 0] for nodes in graph.nodes])
        self.results: list[Any] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        left = list(inputs)
        expected = [step.arguments[1] for step in self.wiring.steps if step.operator == "input"]
        if [tuple(x.shape) for x in left] != expected:
            raise ValueError(f"inputs have shapes {[tuple(x.shape) for x in left]}; the wiring was read on {expected}")
        for step in self.wiring.steps[:-1]:
            self.results.append(left.pop(0) if step.operator == "input" else self._result(step))
        return self.resolved(self.wiring.steps[-1].arguments)

    def _result(self, step: Step) -> Any:
        if step.operator == "constant":
            return step.arguments[0]
        if step.operator == "buffer":
            return self.graph.others[step.arguments[0]]
        if step.parameter is not None:
            if step.operator != "parameter" and step.name not in MOVES:
                raise self.fail(step, "it changes a parameter before its use")
            return None
        try:
            return HANDLERS.get(step.name, run)(self, step)
        except SimulationError as error:
            raise self.fail(step, str(error)) from error

    def fail(self, step: Step, problem: str) -> SimulationError:
        return SimulationError(f"can't simulate on the graph: {problem} (operator {step.operator} in '{step.where}')")

    def edges(self, step: Step, *kinds: str) -> Edges | None:
        """The edges that an operator made, of these kinds; None if it made none."""
        blocks = [b for b in step.blocks if self.wiring.blocks[b].kind in kinds]
        return Edges(self.graph, blocks) if blocks else None

    def only(self, step: Step, *kinds: str) -> Edges | None:
        """All the edges that an operator made, which may be of these kinds only."""
        others = {self.wiring.blocks[b].kind for b in step.blocks} - set(kinds)
        if others:
            raise SimulationError(f"it makes edges of kind {', '.join(sorted(others))}")
        return self.edges(step, *kinds)

    def resolved(self, arguments: Any) -> Any:
        """Arguments with results in place of references."""
        if isinstance(arguments, Reference):
            if self.parameter(arguments):
                raise SimulationError(f"it reads parameter {self.parameter(arguments)}")
            return self.results[arguments.step]
        if isinstance(arguments, (list, tuple)):
            kind = tuple if isinstance(arguments, tuple) else list
            return kind(self.resolved(x) for x in arguments)
        return arguments

    def parameter(self, argument: Any) -> str | None:
        """The parameter that an argument is, None for anything else."""
        return self.wiring.steps[argument.step].parameter if isinstance(argument, Reference) else None

    def ids(self, argument: Reference) -> Tensor:
        """The neurons behind an argument's elements."""
        ids = self.wiring.steps[argument.step].ids
        if ids is None:
            raise SimulationError("the neurons that it reads are not known")
        return ids

    def rows(self, step: Step, argument: Reference, axis: int) -> Tensor:
        """The neurons along an axis, as the last axis; of a flattened image those of the virtual layer."""
        length = self.results[argument.step].shape[axis]
        rows = self.ids(argument).movedim(axis, -1)
        rows = rows.expand(*rows.shape[:-1], length)
        virtual = self.edges(step, "flatten")
        if virtual is None:
            return rows
        if not torch.equal(virtual.sources, rows.flatten()):
            raise SimulationError("its virtual layer does not hold what it reads")
        return virtual.targets.view(rows.shape)

    def bias(self, parameter: Any, targets: Tensor) -> Tensor:
        """The numbers on neurons, where an operator's argument put them."""
        groups = torch.bucketize(targets.flatten().unique(), torch.tensor(self.wiring.offsets[1:]), right=True)
        if {self.wiring.groups[g].bias for g in groups.tolist()} != {self.parameter(parameter)}:
            raise SimulationError(f"parameter {self.parameter(parameter)} is not the bias of its neurons")
        return self.biases[targets]


def run(simulation: Simulation, step: Step) -> Any:
    """An operator between the neurons: it moves, pools or transforms values and makes no edges."""
    simulation.only(step)
    return call(step, simulation.resolved(step.arguments), step.keywords)


def elementwise(simulation: Simulation, step: Step) -> Tensor:
    """Operands come along the edges of residuals and products; parameters are on edges, or biases."""
    parameters = [x for x in step.arguments if simulation.parameter(x)]
    if parameters:
        return with_parameter(simulation, step, parameters[0])
    edges = simulation.only(step, "residual", "product")

    def value(argument: Any) -> Any:
        found = simulation.resolved(argument)
        if edges is None or not isinstance(found, Tensor):
            return found
        return found * edges.factor(simulation.ids(argument), step.ids)

    return call(step, [value(argument) for argument in step.arguments], step.keywords)


def with_parameter(simulation: Simulation, step: Step, parameter: Reference) -> Tensor:
    """x + bias or γ x."""
    adds, others = step.name == "add", [x for x in step.arguments if x is not parameter]
    if step.name not in ("add", "mul") or len(others) != 1 or step.keywords or step.ids is None:
        raise SimulationError(f"it reads parameter {simulation.parameter(parameter)}")
    edges = simulation.only(step, "residual" if adds else "normalization")
    x = simulation.resolved(others[0])
    if edges is not None:
        x = x * edges.factor(simulation.ids(others[0]), step.ids)
    elif not adds:
        raise SimulationError(f"it reads parameter {simulation.parameter(parameter)}")
    return x + simulation.bias(parameter, step.ids) if adds else x


def linear(simulation: Simulation, step: Step) -> Tensor:
    """Sums over the edges into every neuron of the last axis."""
    arguments = dict(zip(ARGUMENTS[step.name], step.arguments, strict=False))
    argument, bias = arguments["x"], arguments.get("bias")
    if simulation.parameter(argument) or not simulation.parameter(arguments["weight"]) or step.keywords:
        return product(simulation, step)
    x, sources = simulation.resolved(argument), simulation.rows(step, argument, -1)
    weight = simulation.edges(step, "linear").single(sources.unsqueeze(-2), step.ids.unsqueeze(-1))
    if weight.shape[:-2].numel() == 1:
        sums = torch.nn.functional.linear(x, weight.flatten(0, -2))
    else:
        sums = (weight @ x.unsqueeze(-1)).squeeze(-1)
    return sums if bias is None else sums + simulation.bias(bias, step.ids)


def product(simulation: Simulation, step: Step) -> Tensor:
    """A matrix product of two activations: (…, rows, inner) and (…, inner, columns)."""
    edges = simulation.only(step, "product")
    if edges is None or len(step.arguments) != 2 or step.keywords or step.ids.dim() < 2:
        raise SimulationError("it is no product along edges")
    a, b = simulation.resolved(step.arguments)
    first, second = map(simulation.ids, step.arguments)
    new = step.ids.unsqueeze(-1)  # (…, rows, columns, inner)
    left = a.unsqueeze(-2) * edges.factor(first.unsqueeze(-2), new)
    right = b.mT.unsqueeze(-3) * edges.factor(second.mT.unsqueeze(-3), new)
    return (left * right).sum(-1)


def attention(simulation: Simulation, step: Step) -> Tensor:
    """Queries and keys meet at a head's score neuron, scores and values at the neurons that gather."""
    if step.keywords:
        raise SimulationError(f"it has the options {sorted(step.keywords)}")
    edges = simulation.only(step, "product")
    if edges is None:
        raise SimulationError("it is no product along edges")
    q, k, v, *rest = simulation.resolved(step.arguments)
    queries, keys, values = map(simulation.ids, step.arguments[:3])
    from_scores = ~torch.isin(edges.sources, values)
    order = edges.targets[from_scores].sort()
    place = torch.searchsorted(order.values, step.ids.contiguous()).clamp(max=len(order.values) - 1)
    if not torch.equal(order.values[place], step.ids):
        raise SimulationError("what it gathers has no edge from a score")
    scores = edges.sources[from_scores][order.indices][place][..., :1]  # (…, 1, 1): the head's neuron
    gathered = call(
        step,
        [
            q * edges.single(queries, scores),
            k * edges.single(keys, scores),
            v * edges.single(values, step.ids),
            *rest,
        ],
        step.keywords,
    )
    return gathered * edges.single(scores, step.ids)


def convolution(simulation: Simulation, step: Step) -> Tensor:
    """Kernels from the edges between channels, laid out as the operator wants them."""
    argument, weight, bias, *rest = (*step.arguments, *[None] * (3 - len(step.arguments)))
    if not simulation.parameter(weight):
        raise SimulationError("its kernels are no parameter")
    kernel = simulation.wiring.blocks[step.blocks[-1]].kernel
    channel = simulation.resolved(argument).dim() - 1 - len(kernel)
    transposed, groups = form_of_convolution(step.name, rest)
    sources = simulation.rows(step, argument, channel).reshape(-1).view(groups, 1, -1)
    targets = step.ids.movedim(channel, -1).reshape(-1)
    features = simulation.edges(step, "convolution")(sources, targets.view(groups, -1, 1))
    features = features.transpose(1, 2) if transposed else features
    weights = features.flatten(0, 1).unflatten(-1, kernel)
    biases = None if bias is None else simulation.bias(bias, targets)
    return call(step, [simulation.resolved(argument), weights, biases, *rest], step.keywords)


def norm(simulation: Simulation, step: Step) -> Tensor | tuple[Tensor, ...]:
    """The operator without its parameters, then γ on the edges and β on the neurons."""
    argument = step.arguments[0]
    parameters = [x for x in step.arguments if simulation.parameter(x)]
    plain = [None if simulation.parameter(x) else simulation.resolved(x) for x in step.arguments]
    normalized = call(step, plain, step.keywords)
    if not parameters:
        return normalized
    edges = simulation.only(step, "normalization")
    if edges is None:
        raise SimulationError("it has a bias and no weight")
    first, *others = normalized if isinstance(normalized, tuple) else (normalized,)
    first = first * edges.single(simulation.ids(argument), step.ids)
    for bias in parameters[1:]:
        first = first + simulation.bias(bias, step.ids)
    return (first, *others) if isinstance(normalized, tuple) else first


ARGUMENTS = {
    "linear": ("x", "weight", "bias"),
    "addmm": ("bias", "x", "weight"),
    "mm": ("x", "weight"),
    "matmul": ("x", "weight"),
    "bmm": ("x", "weight"),
}
MOVES = {
    "view", "t", "transpose", "permute", "unsqueeze", "squeeze", "select", "slice", "alias", "detach", "getitem",
    "split", "split_with_sizes", "unbind", "expand", "clone",
}  # fmt: skip
ELEMENTWISE = {"add", "sub", "rsub", "mul", "div", "maximum", "minimum"}
CONVOLUTIONS = {"convolution"} | {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
NORMS = {
    "batch_norm", "_native_batch_norm_legit_no_training", "layer_norm", "native_layer_norm", "rms_norm", "group_norm",
    "instance_norm",
}  # fmt: skip
HANDLERS: dict[str, Callable[[Simulation, Step], Any]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(ARGUMENTS, linear),
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(NORMS, norm),
    "scaled_dot_product_attention": attention,
}
