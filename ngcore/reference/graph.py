"""Neural graphs built the plain way: layer by layer, as an edge list or as dense n x n tensors.

A plan is written by hand for each architecture; it lists neurons and connections. Nothing here uses `ngcore.graph`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch_geometric.data import Data

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Connection:
    """Edges between neurons, given by their numbers.

    Shapes:
        weight: (targets, sources, *kernel), every source to every target; with `paired` (pairs,), the first source
            to the first target, and so on.
    """

    sources: Sequence[int]
    targets: Sequence[int]
    weight: Tensor
    paired: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        return () if self.paired else tuple(self.weight.shape[2:])

    def features(self, window: Sequence[int]) -> Tensor:
        """Kernels in the middle of the window, its axes flattened; a number without a kernel comes first."""
        if not self.kernel:
            return pad(self.weight.unsqueeze(-1), (0, math.prod(window) - 1))
        margins: list[int] = []
        for size, whole in zip(reversed(self.kernel), reversed(window), strict=True):
            before = (whole - size) // 2
            margins += [before, whole - size - before]
        return pad(self.weight, margins).flatten(2)


@dataclass
class Plan:
    """Neurons, numbered as they are added, and the connections between them."""

    biases: list[Tensor] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    num_nodes: int = 0

    @property
    def window(self) -> tuple[int, ...]:
        """The largest kernel along each axis."""
        kernels = [connection.kernel for connection in self.connections if connection.kernel]
        return tuple(map(max, zip(*kernels, strict=True)))

    def neurons(self, size: int, bias: Tensor | None = None) -> range:
        """Add neurons; their numbers."""
        self.biases.append(torch.zeros(size) if bias is None else bias)
        self.num_nodes += size
        return range(self.num_nodes - size, self.num_nodes)

    def connect(self, sources: range, targets: range, weight: Tensor) -> None:
        """Every source to every target; the weight has the targets first, then the sources, then a kernel's axes."""
        self.connections.append(Connection(sources, targets, weight))

    def pair(self, sources: Sequence[int], targets: Sequence[int], values: Tensor | None = None) -> None:
        """One source to one target, with the value 1 where there is no other."""
        values = torch.ones(len(targets)) if values is None else values
        self.connections.append(Connection(sources, targets, values, paired=True))

    def layer(self, sources: range, state: State, name: str) -> range:
        """A linear layer or a convolution, into neurons of its own."""
        weight = state[f"{name}.weight"]
        targets = self.neurons(len(weight), state.get(f"{name}.bias"))
        self.connect(sources, targets, weight)
        return targets

    def transposed_layer(self, sources: range, state: State, name: str) -> range:
        """A linear layer whose weight has the sources first."""
        targets = self.neurons(state[f"{name}.weight"].shape[1], state[f"{name}.bias"])
        self.connect(sources, targets, state[f"{name}.weight"].T)
        return targets

    def norm(self, sources: range, state: State, name: str) -> range:
        """A batch or layer norm: every neuron is scaled into one of its own."""
        targets = self.neurons(len(sources), state[f"{name}.bias"])
        self.pair(sources, targets, state[f"{name}.weight"])
        return targets

    def attention(self, queries: range, keys: range, values: range, heads: int) -> range:
        """A neuron for every head, where queries meet keys, and one for every dimension, where it meets the values."""
        scores, mixed = self.neurons(heads), self.neurons(len(values))
        width = len(values) // heads
        head_of = [head for head in scores for _ in range(width)]
        self.pair(queries, head_of)
        self.pair(keys, head_of)
        self.pair(head_of, mixed)
        self.pair(values, mixed)
        return mixed


# Architectures --------------------------------------------------------------------------------------------------------


def plan_mlp(state: State) -> Plan:
    """`layers.<i>.weight` and `layers.<i>.bias`."""
    plan = Plan()
    neurons = plan.neurons(state["layers.0.weight"].shape[1])
    for i in range(len(state) // 2):
        neurons = plan.layer(neurons, state, f"layers.{i}")
    return plan


def plan_wild_park(state: State, residual: Sequence[int]) -> Plan:
    """A CNN of the Wild Park; layer i also reads the output of layer `residual[i]`, where that is not -1."""
    plan = Plan()
    neurons = plan.neurons(state["layers.0.weight"].shape[1])
    outputs = []
    for i, earlier in enumerate(residual):
        neurons = plan.layer(neurons, state, f"layers.{i}")
        if earlier >= 0:
            shared = min(len(neurons), len(outputs[earlier]))
            plan.pair(outputs[earlier][:shared], neurons[:shared])
        outputs.append(neurons)
    plan.layer(neurons, state, "fc")
    return plan


def plan_resnet(state: State) -> Plan:
    """A ResNet of basic blocks, two in each stage, under the names of `transformers`."""
    plan = Plan()

    def convolution(sources: range, name: str) -> range:
        return plan.norm(plan.layer(sources, state, f"{name}.convolution"), state, f"{name}.normalization")

    neurons = convolution(plan.neurons(3), "resnet.embedder.embedder")
    for stage in range(4):
        for block in range(2):
            name = f"resnet.encoder.stages.{stage}.layers.{block}"
            widened = f"{name}.shortcut.convolution.weight" in state
            skipped = convolution(neurons, f"{name}.shortcut") if widened else neurons
            neurons = convolution(convolution(neurons, f"{name}.layer.0"), f"{name}.layer.1")
            plan.pair(skipped, neurons)
    plan.layer(neurons, state, "classifier.1")
    return plan


def plan_vit(state: State, layers: int, heads: int) -> Plan:
    """A vision transformer under the names of `transformers`."""
    plan = Plan()
    patches = plan.layer(plan.neurons(3), state, "vit.embeddings.patch_embeddings.projection")
    cls_token = plan.neurons(len(patches), state["vit.embeddings.cls_token"].flatten())
    positions = state["vit.embeddings.position_embeddings"].squeeze(0)
    neurons = plan.neurons(len(patches))
    plan.pair(patches, neurons)
    plan.pair(cls_token, neurons)
    plan.connect(plan.neurons(len(positions)), neurons, positions.T)
    for i in range(layers):
        name = f"vit.layers.{i}"
        normed = plan.norm(neurons, state, f"{name}.layernorm_before")
        heads_read = [plan.layer(normed, state, f"{name}.attention.{which}_proj") for which in "qkv"]
        neurons, skipped = plan.layer(plan.attention(*heads_read, heads), state, f"{name}.attention.o_proj"), neurons
        plan.pair(skipped, neurons)
        hidden = plan.layer(plan.norm(neurons, state, f"{name}.layernorm_after"), state, f"{name}.mlp.fc1")
        neurons, skipped = plan.layer(hidden, state, f"{name}.mlp.fc2"), neurons
        plan.pair(skipped, neurons)
    plan.layer(plan.norm(neurons, state, "vit.layernorm"), state, "classifier")
    return plan


def plan_gpt2(state: State, layers: int, heads: int) -> Plan:
    """GPT-2 under the names of `transformers`; the head shares the embedding's weight."""
    plan = Plan()
    words, positions = state["transformer.wte.weight"], state["transformer.wpe.weight"]
    width = words.shape[1]
    vocabulary, word = plan.neurons(len(words)), plan.neurons(width)
    places, place = plan.neurons(len(positions)), plan.neurons(width)
    neurons = plan.neurons(width)
    plan.connect(vocabulary, word, words.T)
    plan.connect(places, place, positions.T)
    plan.pair(word, neurons)
    plan.pair(place, neurons)
    for i in range(layers):
        name = f"transformer.h.{i}"
        read = plan.transposed_layer(plan.norm(neurons, state, f"{name}.ln_1"), state, f"{name}.attn.c_attn")
        mixed = plan.attention(read[:width], read[width : 2 * width], read[2 * width :], heads)
        neurons, skipped = plan.transposed_layer(mixed, state, f"{name}.attn.c_proj"), neurons
        plan.pair(skipped, neurons)
        hidden = plan.transposed_layer(plan.norm(neurons, state, f"{name}.ln_2"), state, f"{name}.mlp.c_fc")
        neurons, skipped = plan.transposed_layer(hidden, state, f"{name}.mlp.c_proj"), neurons
        plan.pair(skipped, neurons)
    plan.connect(plan.norm(neurons, state, "transformer.ln_f"), plan.neurons(len(words)), words)
    return plan


# Graphs ---------------------------------------------------------------------------------------------------------------


def edge_list(plan: Plan, parallel: bool = False) -> Data:
    """Index tensors and attribute rows of every layer, put together at the end.

    A convolution's edges have its kernel positions as features, filled up with zeros to the largest kernel. With
    `parallel` every position is an edge of its own: rows of 256 features would not fit where one layer of many needs
    them.
    """
    window = plan.window
    index, attributes = [], []
    for connection in plan.connections:
        sources, targets = _numbers(connection.sources), _numbers(connection.targets)
        if not connection.paired:
            sources, targets = sources.repeat(len(targets)), targets.repeat_interleave(len(sources))
        edges = torch.stack([sources, targets])
        if parallel:
            index.append(edges.repeat_interleave(math.prod(connection.kernel), 1))
            attributes.append(connection.weight.reshape(-1, 1))
        else:
            index.append(edges)
            attributes.append(connection.features(window).reshape(edges.shape[1], -1))
    return Data(x=_node_features(plan), edge_index=torch.cat(index, 1), edge_attr=torch.cat(attributes))


def dense(plan: Plan) -> Data:
    """A matrix of all pairs of neurons, rows are sources, scanned for edges, as the public code does.

    It marks edges apart from their weights: the public code loses an edge whose weight is 0. A pair of neurons can
    have one edge only.
    """
    window = plan.window
    values = torch.zeros(plan.num_nodes, plan.num_nodes, math.prod(window))
    connected = torch.zeros(plan.num_nodes, plan.num_nodes, dtype=torch.bool)
    for connection in plan.connections:
        features = connection.features(window)
        sources, targets = _numbers(connection.sources), _numbers(connection.targets)
        if not connection.paired:
            sources, features = sources.unsqueeze(1), features.transpose(0, 1)
        values[sources, targets] = features
        connected[sources, targets] = True
    index = connected.nonzero().T
    return Data(x=_node_features(plan), edge_index=index, edge_attr=values[index[0], index[1]])


def dense_bytes(plan: Plan) -> int:
    """Memory that `dense` takes before it scans: float32 features and a mark for every pair of neurons."""
    return plan.num_nodes**2 * (4 * math.prod(plan.window) + 1)


def _numbers(neurons: Sequence[int]) -> Tensor:
    if isinstance(neurons, range):
        return torch.arange(neurons.start, neurons.stop)
    return torch.tensor(neurons)


def _node_features(plan: Plan) -> Tensor:
    return torch.cat(plan.biases).unsqueeze(1)
