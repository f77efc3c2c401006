"""Reading the wiring of any PyTorch network: its operators, walked once with neurons in place of activations."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ngcore.graph.symmetry.spaces import pinned_leaf, reading
from ngcore.graph.tracing.closing import closed
from ngcore.graph.tracing.expressions import Named
from ngcore.graph.tracing.ledgers import PlaceError
from ngcore.graph.tracing.reader import RULES, Reader, TraceError
from ngcore.graph.tracing.values import Constant, Unread, Value, applied
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
        match node.op:
            case "placeholder":
                values[node] = _placeholder(reader, exported, node)
            case "call_function":
                values[node] = _call(reader, node, values)
            case "output":
                returned = [out for out in node.args[0] if isinstance(out, fx.Node) and out.name in wanted]
                for out in returned:
                    reader.give_back(values[out])
            case _:
                raise reader.fail(f"no rule for {node.op} nodes")
        reader.read[node] = values.get(node), range(blocks, len(reader.blocks)), reader.where


def _placeholder(reader: Reader, exported: torch.export.ExportedProgram, node: fx.Node) -> Any:
    example = node.meta.get("val")
    name = exported.graph_signature.inputs_to_parameters.get(node.name)
    if name is not None:
        return reader.parameters.value(reader.owners.get(name, name), example.shape)
    constant = _stored(exported, node)
    if constant is not None:
        return constant
    if not isinstance(example, Tensor):
        return example
    return Unread(tuple(example.shape), [pinned_leaf(n) for n in example.shape], node)


def _stored(exported: torch.export.ExportedProgram, node: fx.Node) -> Constant | None:
    """A buffer, or a tensor that the network's code holds."""
    signature = exported.graph_signature
    buffer = signature.inputs_to_buffers.get(node.name)
    name = buffer or signature.inputs_to_lifted_tensor_constants.get(node.name)
    if name is None:
        return None
    if buffer is None or buffer in signature.non_persistent_buffers:
        return Constant.of(exported.constants[name])
    return Constant.of(exported.state_dict[name], Named(name))


def _call(reader: Reader, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    arguments = fx.node.map_arg(node.args, values.__getitem__)
    keywords = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.target is operator.getitem:
        return arguments[0][arguments[1]]
    operands = [x for x in tree_leaves((arguments, dict(keywords))) if isinstance(x, Value)]
    if all(isinstance(x, Constant) for x in operands):
        return _evaluate(node, arguments, keywords, operands)
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
    except PlaceError as error:
        raise reader.fail(str(error)) from error
    except Exception as error:
        raise reader.fail(f"the rule for {name} failed: {type(error).__name__}: {error}") from error
    finally:
        reading.reset(token)


def _evaluate(node: fx.Node, arguments: Any, keywords: Any, operands: Sequence[Constant]) -> Any:
    """Operators on constants alone are run; what they make of numbers of the state dict keeps its formula."""
    formula = applied(node.target, arguments, keywords) if any(x.formula for x in operands) else None

    def number(x: Any) -> Any:
        return x.numbers if isinstance(x, Constant) else x

    def constant(x: Any) -> Any:
        return Constant.of(x, formula) if isinstance(x, Tensor) else x

    result = node.target(*fx.node.map_aggregate(arguments, number), **fx.node.map_aggregate(keywords, number))
    return [constant(x) for x in result] if isinstance(result, (tuple, list)) else constant(result)
