"""What models do with a graph before they read it: make a batch of it, in their own precision."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ngcore.graph import NeuralGraph
from ngcore.graph.batch import GraphBatch, batch_of
from ngcore.models.encoder import check_finite


def prepared(model: nn.Module, graph: NeuralGraph | GraphBatch) -> GraphBatch:
    """The batch that a model reads.

    Raises:
        ValueError: the batch is in another frame, the wiring does not fit the model's, or, where looking costs nothing,
            a parameter is not finite.
    """
    if not model.encoder.standardize.is_fitted:
        model.encoder.standardize.is_fitted = True  # said once
        warnings.warn(
            f"{type(model).__name__} reads parameters as they are: give it its training set first, "
            "model.fit_normalization(graph), or make it with normalization='none'",
            stacklevel=3,
        )
    if isinstance(graph, NeuralGraph):
        dtype = model.encoder.node_linear.weight.dtype
        if graph.edges[0].dtype != dtype:
            graph = graph.map(lambda values: values.to(dtype))
        if graph.edges[0].device.type == "cpu" and not torch.compiler.is_compiling():
            check_finite(graph)
        return batch_of(graph, model.frame)
    if graph.frame != model.frame:
        raise ValueError(
            f"this model was built for {model.frame}, the networks are in {graph.frame}: collect them in the model's "
            "own, Collection(graphs, model.frame)"
        )
    return graph
