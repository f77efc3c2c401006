"""What changes a prediction about a CNN, and what must not: shown on untrained weights."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.data.zoos.wild_park import draw_architecture
from ngcore.graph import NeuralGraph
from ngcore.graph.collection import Collection
from ngcore.models import NGGNN, Scores
from ngcore.tasks.generalization import OPTIONS
from ngcore.tasks.zoos import wiring_of

SHOWN = Architecture((3, 8, 16, 8, 4), (3, 5, 3, 3), (4, 1, 1, 1), (1, 2, 1, 1), ("relu",) * 4, (-1, -1, 0, -1))


def graph_of(architecture: Architecture, state: dict[str, torch.Tensor] | None = None) -> NeuralGraph:
    """One network in double precision, with given parameters or with new ones."""
    state = CNN(architecture).double().state_dict() if state is None else state
    return wiring_of(architecture).graph({name: values.unsqueeze(0) for name, values in state.items()})


def prediction_changes(seed: int = 0, others: int = 32) -> pd.DataFrame:
    """How far an untrained NG-GNN's prediction about one CNN moves: in the company of others, with its channels
    permuted, with another activation, and with its skip connection elsewhere."""
    torch.manual_seed(seed)
    network = CNN(SHOWN).double().state_dict()
    graph = graph_of(SHOWN, network)
    twin = graph.wiring.graph(graph.wiring.symmetry.permute(graph.state_dict(), graph.wiring.symmetry.random()))
    activation = graph_of(replace(SHOWN, activation=("relu", "tanh", "relu", "relu")), network)
    skip = graph_of(replace(SHOWN, residual=(-1, -1, -1, 0)), network)
    company = [graph_of(draw_architecture(seed, run)) for run in range(others)]
    networks = Collection([graph, twin, activation, skip, *company])
    rows = torch.arange(len(networks))
    model = NGGNN(networks, Scores(), **OPTIONS).double().eval()
    model.fit_normalization(networks, rows)
    with torch.no_grad():
        together, alone = model(networks[rows])[:, 0], model(networks[rows[:1]])[0, 0]
    changes = {
        f"in a batch of {len(rows)} networks": together[0] - alone,
        "channels permuted": together[1] - together[0],
        "another activation in one layer": together[2] - together[0],
        "skip connection ends one layer later": together[3] - together[0],
    }
    return pd.DataFrame(
        {"what changes": list(changes), "prediction moves by": [x.abs().item() for x in changes.values()]}
    )
