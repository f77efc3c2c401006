"""Where the neurons of a traced network take their values, on points that its steps run several of at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ngcore.graph.steps import call, resolved, run_steps
from ngcore.graph.structure import Reference, Step
from ngcore.graph.tracing.values import NO_NEURON
from ngcore.graph.wiring import NeuralGraph, Wiring


@dataclass(frozen=True)
class Reading:
    """A step's values as neurons' activations: which elements of those of a point, and the neuron of each.

    Values are viewed as (before, points, after). `scores`: they are the softmax inside of an attention.
    """

    step: int
    elements: Tensor
    neurons: Tensor
    before: int = 1
    scores: bool = False


@dataclass(frozen=True)
class Plan:
    """How a traced wiring is run on any number of points.

    Attributes:
        example: shape of the example's input; the first `batch_axes` axes hold its points.
        readings: where neurons take their values.
        times: over how many elements every neuron is averaged, (nodes,); 0 for those without a value.
    """

    steps: tuple[Step, ...]
    example: tuple[int, ...]
    batch_axes: int
    readings: tuple[Reading, ...]
    times: Tensor

    @property
    def points(self) -> int:
        """How many points the steps run at once."""
        return math.prod(self.example[: self.batch_axes])

    @property
    def input_shape(self) -> str:
        return ", ".join(map(str, self.example[self.batch_axes :]))

    def require_values(self, wiring: Wiring) -> None:
        """Raise a ValueError that names the first group with neurons that take no value."""
        for group, times in zip(wiring.groups, self.times.split([g.size for g in wiring.groups]), strict=True):
            if not times.all():
                raise ValueError(
                    f"the {group.role} neurons of '{group.where or 'the network'}' (layer {group.layer}) have no value "
                    "of their own among the network's steps: they have no activations; `outputs` runs the network"
                )

    def means(self, results: Sequence[Any]) -> Float[Tensor, "points nodes"]:
        """Every neuron's activation at one network's results."""
        total: Tensor | None = None
        for reading in self.readings:
            x = by_points(value_of(self.steps, reading.step, reading.scores, results), reading.before, self.points)
            total = x.new_zeros(self.points, len(self.times)) if total is None else total
            elements, neurons = reading.elements.to(x.device), reading.neurons.to(x.device)
            total = total.index_add(1, neurons, x.index_select(1, elements).to(total.dtype))
        return total / self.times.to(total.device)

    def by_point(self, value: Tensor) -> Float[Tensor, "points ..."]:
        """A returned value with one axis for its points."""
        leading = self.batch_axes if value.shape[: self.batch_axes] == self.example[: self.batch_axes] else 1
        return value.reshape(self.points, *value.shape[leading:])


def value_of(steps: Sequence[Step], place: int, scores: bool, results: Sequence[Any]) -> Any:
    """The result of a step, or the scores inside of it, which are its attention to unit vectors."""
    if not scores:
        return results[place]
    q, k, v, *rest = resolved(steps[place].arguments, results)
    units = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*v.shape[:-1], k.shape[-2])
    return call(steps[place], [q, k, units, *rest], steps[place].keywords)


def by_points(values: Tensor, before: int, points: int) -> Shaped[Tensor, "points elements"]:
    return values.reshape(before, points, -1).transpose(0, 1).reshape(points, -1)


def needed_state(graph: NeuralGraph) -> dict[str, Tensor]:
    """The parameters and buffers that the steps read.

    Raises:
        ValueError: the graph lacks a buffer.
    """
    state, steps = graph.state_dict(), graph.wiring.steps
    read = {x.step for step in steps for x in tree_leaves((step.arguments, dict(step.keywords))) if _refers(x)}
    names = dict.fromkeys(steps[i].arguments[0] for i in sorted(read) if steps[i].operator in ("parameter", "buffer"))
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"the graph lacks {', '.join(missing)}: bind them with the parameters, as state dicts hold them"
        )
    return {name: state[name] for name in names}


def _refers(argument: Any) -> bool:
    return isinstance(argument, Reference)


def flat_state(graph: NeuralGraph) -> dict[str, Tensor]:
    """The same with one batch axis."""
    batch = graph.edges[0].dim() - 3
    state = needed_state(graph)
    return {name: values.flatten(0, batch - 1) if batch else values.unsqueeze(0) for name, values in state.items()}


PLANS: WeakKeyDictionary[Step, Plan] = WeakKeyDictionary()


def plan_of(graph: NeuralGraph) -> Plan:
    """The plan of a wiring, made once.

    Raises:
        ValueError: there are several inputs, or steps that do not run on numbers.
    """
    last = graph.wiring.steps[-1]
    if last not in PLANS:
        PLANS[last] = make_plan(graph)
    return PLANS[last]


@torch.no_grad()
def make_plan(graph: NeuralGraph) -> Plan:
    wiring = graph.wiring
    given = [step for step in wiring.steps if step.operator == "input"]
    if len(given) != 1:
        raise ValueError(f"networks of one input are run on many points, this one has {len(given)}")
    example = tuple(given[0].arguments[1])
    plans = (plan_with(graph, example, axes) for axes in range(leading_axes(wiring, given[0]), -1, -1))
    return next(plan for plan in plans if plan is not None)


def plan_with(graph: NeuralGraph, example: tuple[int, ...], axes: int) -> Plan | None:
    """The plan where these first axes of the example hold points; None if points meet."""
    runs = Runs(graph, example, math.prod(example[:axes]))
    try:
        found = last_readings(runs)
        if any(runs.before(argument.step) > 1 for argument in graph.wiring.steps[-1].arguments):
            return None
    except PointsMeetError:
        return None
    times = torch.bincount(torch.cat([reading.neurons for reading in found]), minlength=graph.wiring.num_nodes)
    return Plan(graph.wiring.steps, example, axes, tuple(found), times)


def leading_axes(wiring: Wiring, step: Step) -> int:
    """How many axes of the example stand before the one along which its neurons lie: those may hold points."""
    ids, rank = step.ids, len(step.arguments[1])
    if ids is None:
        return 1
    neurons = [d for d, size in enumerate(ids.shape) if size > 1]
    if neurons:
        return neurons[0]
    (group,) = {g for g, first in enumerate(wiring.offsets[:-1]) if first == int(ids.flatten()[0])}
    kernels = [block.kernel for block in wiring.blocks if block.source == group]
    return rank - 1 - max(map(len, kernels), default=0)


class PointsMeetError(Exception):
    """Values of several points depend on each other, or lie along no axis of their own."""


class Runs:
    """Runs on placeholders, in each of which one point is NaN, and so is whatever depends on it."""

    def __init__(self, graph: NeuralGraph, example: Sequence[int], points: int) -> None:
        self.wiring, self.steps, self.points = graph.wiring, graph.wiring.steps, points
        state = {
            name: torch.full_like(values[0], 0.01) if name in self.wiring.shapes else values[0]
            for name, values in flat_state(graph).items()
        }
        self.results: dict[int, list[Any]] = {}
        for point in (0, points - 1):
            inputs = graph.edges[0].new_full(example, 0.5)
            inputs.view(points, -1)[point] = math.nan
            try:
                self.results[point] = run_steps(self.steps, state, inputs)
            except (RuntimeError, TypeError, IndexError) as error:
                raise ValueError(f"the network's steps do not run on points of numbers: {error}") from error

    def value(self, place: int, scores: bool = False) -> Any:
        return value_of(self.steps, place, scores, self.results[0])

    def before(self, place: int, scores: bool = False) -> int:
        """How many elements of a value stand before its points, if it is viewed as (before, points, after)."""
        runs = {point: value_of(self.steps, place, scores, results) for point, results in self.results.items()}
        count, rest = divmod(runs[0].numel(), self.points)
        for before in [n for n in range(1, count + 1) if count % n == 0 and rest == 0]:
            if all(self._alone(by_points(values, before, self.points), point) for point, values in runs.items()):
                return before
        raise PointsMeetError

    def _alone(self, values: Tensor, point: int) -> bool:
        unknown = values.isnan()
        unknown[point] = False
        return not unknown.any()

    def reading(self, place: int, ids: Tensor, wanted: Tensor | None = None, scores: bool = False) -> Reading:
        """What the neurons `wanted`, a mask over nodes, take of a value with these ids."""
        before = self.before(place, scores)
        row = by_points(ids.expand(self.value(place, scores).shape), before, self.points)[0]
        known = row != NO_NEURON
        elements = (known if wanted is None else known & wanted[row]).nonzero().flatten()
        return Reading(place, elements, row[elements], before, scores)


def last_readings(runs: Runs) -> list[Reading]:
    """For every neuron the last value that it takes before edges read it."""
    found = [*sums(runs), *reads(runs)]
    latest = torch.full([runs.wiring.num_nodes], -1)
    for r, reading in enumerate(found):
        latest[reading.neurons] = r
    left = []
    for r, reading in enumerate(found):
        own = latest[reading.neurons] == r
        if own.any():
            left.append(replace(reading, elements=reading.elements[own], neurons=reading.neurons[own]))
    return left


def sums(runs: Runs) -> Iterator[Reading]:
    """Values as edges and biases left them: of neurons that only copies read."""
    made: set[int] = set()
    for i, step in enumerate(runs.steps[:-1]):
        read = [x.step for x in step.arguments if isinstance(x, Reference)]
        parts = step.operator == "getitem" and made.issuperset(read)
        if step.operator == "input" or step.blocks or parts or any(runs.steps[r].parameter for r in read):
            made.add(i)
            if step.ids is not None and isinstance(runs.value(i), Tensor):
                yield runs.reading(i, step.ids)


def reads(runs: Runs) -> Iterator[Reading]:
    """Values that edges start from, and those that are returned."""
    for i, step in enumerate(runs.steps):
        wanted = torch.full([runs.wiring.num_nodes], step.operator == "output")
        for b in step.blocks:
            wanted[runs.wiring.edge_index(runs.wiring.blocks[b])[0]] = True
        for argument in filter(_refers, tree_leaves((step.arguments, dict(step.keywords)))):
            ids = runs.steps[argument.step].ids
            if ids is not None and (ids != NO_NEURON).any() and wanted.any():
                yield runs.reading(argument.step, ids, wanted)
                yield from virtual(runs, step, argument.step)
        if step.name == "scaled_dot_product_attention":
            yield scores(runs, step, i)


def virtual(runs: Runs, step: Step, place: int) -> Iterator[Reading]:
    """A flattened value as the neurons of its virtual layer, one for every element along the axis that is read."""
    blocks = [runs.wiring.blocks[b] for b in step.blocks if runs.wiring.blocks[b].kind == "flatten"]
    if blocks:
        sources, targets = torch.cat([runs.wiring.edge_index(block) for block in blocks], 1)
        ids = runs.steps[place].ids.expand(runs.value(place).shape)
        lines = {d: ids.movedim(d, -1).flatten(0, -2)[0] for d in range(ids.dim())}
        axis = next(d for d in reversed(lines) if torch.equal(lines[d], sources))
        yield runs.reading(place, targets.view([len(targets) if d == axis else 1 for d in lines]))


def scores(runs: Runs, step: Step, place: int) -> Reading:
    """The scores inside of an attention, of a neuron for every head: where queries and keys meet."""
    queries = runs.steps[step.arguments[0].step].ids
    sources, targets = torch.cat([runs.wiring.edge_index(runs.wiring.blocks[b]) for b in step.blocks], 1)
    meeting = torch.empty(runs.wiring.num_nodes, dtype=torch.int64)
    meeting[sources] = targets
    return runs.reading(place, meeting[queries[..., :1]], scores=True)
