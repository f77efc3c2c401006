"""Workloads of `python -m ngcore.bench graph`: tracing networks and laying their weights into the wiring.

Networks are named, not passed: a worker builds its own, in `ngcore.bench.networks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from ngcore.bench.harness import SECONDS, Benchmark, DoesNotFitError, Workload

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch_geometric.data import Data

    from ngcore.graph import NeuralGraph
    from ngcore.reference.graph import Plan

NetworkName = Literal["inr", "wild_park", "resnet18", "vit", "gpt2"]
TITLES: dict[NetworkName, str] = {
    "inr": "INR 2-32-32-1",
    "wild_park": "Wild Park CNN",
    "resnet18": "ResNet-18",
    "vit": "ViT-B/16",
    "gpt2": "GPT-2 (124M)",
}
LARGE = ("resnet18", "vit", "gpt2")
ONCE = ("vit", "gpt2")  # a repetition of the edge list can take a minute: these are timed once, without a warm-up
BINDINGS = 100  # per repetition, where once would be too short to time
BATCH = 256
BATCHES = 20  # of them per repetition of ours: one takes milliseconds
DENSE_LIMIT_MB = 16 << 10  # the same on every machine, so that the rows are too
GRAPH_NOTE = (
    "memory_mb: what one repetition takes at its peak beside the parameters and all else held before it\n"
    "ours are views of the parameters; the references are torch_geometric Data\n"
    "ViT-B/16 and GPT-2 are bound by one repetition, without a warm-up; ViT-B/16's edge list has an edge per pixel "
    "of its kernels"
)


def our_tracing(network: NetworkName) -> Workload:
    from ngcore.bench import networks
    from ngcore.graph import trace

    module, example = getattr(networks, network)()
    return Workload(lambda: trace(module, example), 1)


def our_binding(network: NetworkName, times: int = BINDINGS) -> Workload:
    """Laying in the weights of one network, `times` over."""
    from ngcore.bench import networks
    from ngcore.graph import trace

    module, example = getattr(networks, network)()
    wiring, state = trace(module, example), module.state_dict()
    return repeated(lambda: wiring.graph(state), times)


def plain_dense(network: NetworkName, times: int) -> Workload:
    from ngcore.reference.graph import dense, dense_bytes

    module, state = plain_network(network)
    needed_mb = dense_bytes(plan_of(network, module, state)) / (1 << 20)
    if needed_mb > DENSE_LIMIT_MB:
        raise DoesNotFitError(needed_mb)
    return repeated(lambda: dense(plan_of(network, module, state)), times)


def plain_edge_list(network: NetworkName, times: int) -> Workload:
    module, state = plain_network(network)
    return repeated(lambda: edges_of(network, module, state), times)


def our_batch() -> Workload:
    """The state dicts of many CNNs of one architecture are stacked, and bound at once; many times over."""
    import torch

    from ngcore.graph import trace

    module, states = wild_park_states(BATCH)
    wiring = trace(module, torch.zeros(1, 3, 33, 33))

    def run() -> NeuralGraph:
        return wiring.graph({name: torch.stack([state[name] for state in states]) for name in wiring.shapes})

    return repeated(run, BATCHES, items=BATCH)


def plain_dense_batch() -> Workload:
    from ngcore.reference.graph import dense

    module, states = wild_park_states(BATCH)
    return Workload(lambda: [dense(plan_of("wild_park", module, state)) for state in states], BATCH)


def plain_edge_list_batch() -> Workload:
    module, states = wild_park_states(BATCH)
    return Workload(lambda: [edges_of("wild_park", module, state) for state in states], BATCH)


def plain_network(network: NetworkName) -> tuple[nn.Module, dict[str, Tensor]]:
    # the plain builder is imported here, not in the first repetition
    from ngcore.bench import networks
    from ngcore.reference import graph as plain_graph  # noqa: F401

    module, _ = getattr(networks, network)()
    return module, module.state_dict()


def wild_park_states(count: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """One CNN, and the parameters of many like it."""
    from ngcore.bench.networks import WildParkCNN

    modules = [WildParkCNN() for _ in range(count)]
    return modules[0], [module.state_dict() for module in modules]


def plan_of(network: NetworkName, module: nn.Module, state: Mapping[str, Tensor]) -> Plan:
    """The plain description of a network; making it is part of the work."""
    from ngcore.reference import graph as plain

    if network == "inr":
        return plain.plan_mlp(state)
    if network == "wild_park":
        return plain.plan_wild_park(state, module.residual)
    if network == "resnet18":
        return plain.plan_resnet(state)
    if network == "vit":
        return plain.plan_vit(state, module.config.num_hidden_layers, module.config.num_attention_heads)
    return plain.plan_gpt2(state, module.config.n_layer, module.config.n_head)


def edges_of(network: NetworkName, module: nn.Module, state: Mapping[str, Tensor]) -> Data:
    from ngcore.reference.graph import edge_list

    return edge_list(plan_of(network, module, state), parallel=network == "vit")


def repeated(work: Callable[[], object], times: int, items: int = 1) -> Workload:
    """`work`, which handles so many items, many times over."""

    def run() -> None:
        for _ in range(times):
            work()

    return Workload(run, times * items)


def tracing_row(network: NetworkName) -> Benchmark:
    title, repetitions = f"{TITLES[network]}: trace", 1 if network in LARGE else 3
    return Benchmark(title, SECONDS, partial(our_tracing, network), None, "extra", warm_ups=1, repetitions=repetitions)


def laying_row(network: NetworkName, how: str, reference: Callable[..., Workload]) -> Benchmark:
    title, times = f"{TITLES[network]}: bind weights, against {how}", 1 if network in LARGE else BINDINGS
    ours, plain = partial(our_binding, network), partial(reference, network, times)
    warm_ups, repetitions = (0, 1) if network in ONCE else (1, 3)
    return Benchmark(title, "networks/s", ours, plain, "extra", warm_ups, repetitions)


def batch_row(how: str, reference: Callable[[], Workload]) -> Benchmark:
    title = f"{BATCH} Wild Park CNNs: bind weights, against {how}"
    return Benchmark(title, "networks/s", our_batch, reference, "extra", warm_ups=1, repetitions=3)


GRAPH_ROWS = [
    *(tracing_row(network) for network in TITLES),
    *(
        laying_row(network, how, reference)
        for network in TITLES
        for how, reference in (("dense n x n", plain_dense), ("edge list", plain_edge_list))
    ),
    batch_row("dense n x n", plain_dense_batch),
    batch_row("edge lists", plain_edge_list_batch),
]
