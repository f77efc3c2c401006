"""Reading the wiring of any PyTorch network: its operators, walked once with neurons in place of activations."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ngcore.graph.symmetry.spaces import Space, pinned_leaf, reading, uniform
from ngcore.graph.tracing.closing import closed
from ngcore.graph.tracing.expressions import Named
from ngcore.graph.tracing.reader import RULES, Reader, TraceError, Value, applied, constant_axes
from ngcore.graph.wiring import Wiring


def trace(module: nn.Module, *example_inputs: Any, **example_keywords: Any) -> Wiring:
    """The wiring of a network, read from the operators that it runs on example inputs.

    Choose examples with at least three positions along sequences and odd sizes along images: an axis of length 1
    hides what happens along it. The network is read in evaluation mode; its weights do not matter.

    Raises:
        TraceError: the network can't be exported, or an operator has no rule; the message says which and where.
    """
    with _evaluation_mode(module), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch.export's own
        try:
            exported = torch.export.export(module, example_inputs, example_keywords, strict=False)
            exported = exported.run_decompositions({})
        except Exception as error:
            raise TraceError(f"torch.export can't read {type(module).__name__}: {error}") from error
    reader = Reader(module, owners=_owners(module))
    _read(reader, exported)
    return closed(reader, exported)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, training in modes:
            inner.training = training


def _owners(module: nn.Module) -> dict[str, str]:
    """The first name of every parameter: tied ones have several."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _read(reader: Reader, exported: torch.export.ExportedProgram) -> None:
    """Walk the operators."""
    values: dict[fx.Node, Any] = {}
    wanted = set(exported.graph_signature.user_outputs)
    for node in exported.graph.nodes:
        reader.node = node
        blocks = len(reader.blocks)
        if node.op == "placeholder":
            values[node] = _placeholder(reader, exported, node)
        elif node.op == "call_function":
            values[node] = _call(reader, node, values)
            for value in values[node] if isinstance(values[node], (tuple, list)) else [values[node]]:
                if isinstance(value, Value) and value.source is None:
                    value.source = node
        elif node.op == "output":
            for out in node.args[0]:
                if isinstance(out, fx.Node) and out.name in wanted:
                    reader.give_back(values[out])
        else:
            raise reader.fail(f"no rule for {node.op} nodes")
        reader.read[node] = values.get(node), range(blocks, len(reader.blocks)), reader.where


def _placeholder(reader: Reader, exported: torch.export.ExportedProgram, node: fx.Node) -> Any:
    signature = exported.graph_signature
    example = node.meta.get("val")
    name = signature.inputs_to_parameters.get(node.name)
    if name is not None:
        name = reader.owners.get(name, name)
        if name not in reader.axes:
            reader.axes[name] = tuple(Space(n) if n != 1 else uniform(1) for n in example.shape)
            reader.slots[name] = torch.empty(example.shape, device="meta")
        return Value(tuple(example.shape), list(reader.axes[name]), slot=(name, reader.slots[name]))
    buffer = signature.inputs_to_buffers.get(node.name)
    lifted = signature.inputs_to_lifted_tensor_constants.get(node.name)
    if buffer is not None or lifted is not None:
        found = exported.constants if lifted is not None or buffer in signature.non_persistent_buffers else None
        constant = found[lifted or buffer] if found is not None else exported.state_dict[buffer]
        formula = Named(buffer) if buffer in exported.state_dict else None
        return Value(tuple(constant.shape), constant_axes(constant), constant=constant, source=node, formula=formula)
    if not isinstance(example, Tensor):
        return example
    return Value(tuple(example.shape), [pinned_leaf(n) for n in example.shape], source=node)


def _call(reader: Reader, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    arguments = fx.node.map_arg(node.args, values.__getitem__)
    keywords = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.target is operator.getitem:
        return arguments[0][arguments[1]]
    found: list[Value] = []
    fx.node.map_aggregate((arguments, keywords), lambda x: found.append(x) if isinstance(x, Value) else None)
    if all(value.kind == "constant" for value in found):
        return _evaluate(node, arguments, keywords)
    name = reader.operator
    if name not in RULES:
        raise reader.fail(
            f"no rule for the operator {name}; register one with @ngcore.graph.rule('{name}'), "
            "as ngcore/graph/tracing/rules/ does"
        )
    token = reading.set(f"{name} in '{reader.named}'")
    try:
        return RULES[name](reader, *arguments, **keywords)
    except TraceError:
        raise
    except Exception as error:
        raise reader.fail(f"the rule for {name} failed: {type(error).__name__}: {error}") from error
    finally:
        reading.reset(token)


def _evaluate(node: fx.Node, arguments: Any, keywords: Any) -> Any:
    """Operators on constants alone are run; what they make of numbers of the state dict keeps its formula."""
    found: list[Value] = []

    def number(x: Any) -> Any:
        if isinstance(x, Value):
            found.append(x)
            return x.constant
        return x

    result = node.target(*fx.node.map_aggregate(arguments, number), **fx.node.map_aggregate(keywords, number))
    several = isinstance(result, (tuple, list))
    constants = [
        Value(tuple(x.shape), constant_axes(x), constant=x, source=node) if isinstance(x, Tensor) else x
        for x in (result if several else [result])
    ]
    if any(value.formula for value in found):
        formula = applied(node.target, arguments, keywords)
        for constant in constants:
            constant.formula = formula
    return constants if several else constants[0]
