"""Whether what a row times computes what its plain reference computes: compared before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ngcore.study.compiling import summary_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ngcore.graph import NeuralGraph

# Largest distance of outputs and of gradients, each as one vector, relative to the plain form's, which is in float32.
# bfloat16 keeps 8 digits of a fraction (2^-9 = 0.002 of every number is lost, in some ten successive products):
# measured for the gradients 0.016 (NG-GNN) and 0.019 (NG-T), compiled, which rounds elsewhere, 0.015 and 0.065.
TOLERANCES = {"float32": 5e-5, "bfloat16": 0.1}
CHECKED_STEPS = 10  # of fitting an INR
FIT_TOLERANCE = 1e-2  # Adam divides gradients by their size, and so rounding errors of small ones count in full


def compare_models(
    ours: nn.Module,
    plain: nn.Module,
    our_loss: Callable[[nn.Module], tuple[Tensor, Tensor]],
    plain_loss: Callable[[nn.Module], tuple[Tensor, Tensor]],
    precision: str,
) -> str | None:
    """What is wrong with a model beside the plain one, None for nothing. Each loss gives (output, loss).

    The plain model gets the other's weights; the two have no dropout.
    """
    cut = getattr(plain, "cut", dict)  # of a form with several parameters merged into one: the plain form's own
    plain.load_state_dict(cut(ours.state_dict()))
    try:
        found, gradients = run(ours, our_loss)
    except Exception as error:  # of a compiler above all
        return summary_of(error)
    expected, others = run(plain, plain_loss)
    gradients = cut(gradients)
    own = [gradients[name] for name in sorted(gradients)]
    other = [others[name] for name in sorted(gradients)]
    tolerance = TOLERANCES[precision]
    return compare("outputs", [found], [expected], tolerance) or compare("gradients", own, other, tolerance)


def run(model: nn.Module, loss: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The output, and the gradient of every parameter by its name."""
    import torch

    output, value = loss(model)
    value.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return output.detach(), gradients


def compare(what: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> str | None:
    """What is wrong with some numbers, as one vector."""
    import torch

    own, other = (torch.cat([x.detach().double().flatten() for x in some]) for some in (found, expected))
    if own.shape != other.shape:
        return f"{what}: {own.numel()} numbers instead of {other.numel()}"
    distance = ((own - other).norm() / other.norm()).item()
    return None if distance < tolerance else f"{what} differ by {distance:.2g} of their norm (allowed {tolerance:g})"


def check_classifier(method: str, precision: str = "float32", device: str = "cpu") -> str | None:
    """NG-GNN, NG-T or DWSNet beside the plain form: class scores, and the gradients of a cross entropy."""
    import torch
    import torch.nn.functional as F

    from ngcore.bench import __main__ as bench

    torch.manual_seed(0)
    graph = bench.random_networks(bench.MICRO_BATCH).map(lambda x: x.to(device))
    labels = bench.random_labels(bench.MICRO_BATCH).to(device)
    ours, plain, inputs = classifiers(method, graph, torch.device(device), dropout=0.0)

    def loss(x: object, precision: str, model: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found = model(x)
        return found, F.cross_entropy(found.float(), labels)

    return compare_models(ours, plain, partial(loss, graph, precision), partial(loss, inputs, "float32"), precision)


def classifiers(
    method: str, graph: NeuralGraph, device: torch.device, dropout: float
) -> tuple[nn.Module, nn.Module, object]:
    """Ours, compiled where it has parts for it, the plain form, and what that reads in place of `graph`."""
    from ngcore.bench import __main__ as bench
    from ngcore.models import NGGNN, NGT, Scores
    from ngcore.models.baselines import DWSNet
    from ngcore.reference.dws import PlainDWSNet
    from ngcore.reference.ng_gnn import PlainNGGNN
    from ngcore.reference.ng_t import PlainNGT

    if method == "DWSNet":
        ours, plain = (form(graph.wiring, bench.NUM_CLASSES, dropout=dropout) for form in (DWSNet, PlainDWSNet))
        inputs: object = graph
    else:
        model, form = {"NG-GNN": (NGGNN, PlainNGGNN), "NG-T": (NGT, PlainNGT)}[method]
        scores = Scores(bench.NUM_CLASSES)
        ours = bench.compiled(model(graph.wiring, scores, dropout=dropout))
        plain, inputs = form(bench.inr_frame(), scores, dropout=dropout), plain_inputs(graph, method)
    ours.fit_normalization(graph)
    return ours.to(device), plain.to(device), inputs


def check_editor(method: str) -> str | None:
    """NG-GNN or NG-T beside the plain form: what the edited networks render, and the gradients of its error."""
    import torch
    import torch.nn.functional as F

    from ngcore.bench import __main__ as bench
    from ngcore.data.inrs.siren import render
    from ngcore.models import NGGNN, NGT, Editor, PerParameter
    from ngcore.reference.editing import PlainEditor
    from ngcore.reference.ng_gnn import PlainNGGNN
    from ngcore.reference.ng_t import PlainNGT

    torch.manual_seed(0)
    graph, wiring = bench.random_networks(bench.MICRO_BATCH), bench.inr_wiring()
    images, networks = bench.random_images(bench.MICRO_BATCH), [network.state_dict() for network in singles(graph)]
    model, form, sigma = {"NG-GNN": (NGGNN, PlainNGGNN, None), "NG-T": (NGT, PlainNGT, 3.0)}[method]
    options = {"sigma": sigma, "dropout": 0.0}
    ours = bench.compiled(Editor(model(wiring, PerParameter(), **options)))
    plain = PlainEditor(form(bench.inr_frame(), PerParameter(), **options), wiring)
    ours.fit_normalization(graph)

    def loss(found: Callable[[nn.Module], Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
        rendered = found(model)
        return rendered, F.mse_loss(rendered.mean(0), images)

    inputs = plain_inputs(graph, method)
    return compare_models(
        ours,
        plain,
        partial(loss, lambda model: render(model(graph).state_dict())),
        partial(loss, lambda model: model(inputs, networks)),
        "float32",
    )


def check_inr_fit() -> str | None:
    """Some steps of fitting beside Adam on one INR after the other: the parameters' changes, which gradients made."""
    import torch

    from ngcore.data.inrs import siren
    from ngcore.reference.inr import fit_one

    torch.manual_seed(0)
    images, flat = torch.rand(2, 28, 28), siren.initialize(range(2))
    initial = siren.INR.unflatten(flat)
    fitted = siren.fit_sirens(images, flat, steps=CHECKED_STEPS, learning_rate=1e-3, compiled=True).parameters
    found, expected = [], []
    for n, image in enumerate(images):
        start = {name: values[n] for name, values in initial.items()}
        alone = fit_one(image, CHECKED_STEPS, 1e-3, start)
        found += [fitted[name][n] - start[name] for name in start]
        expected += [alone[name] - start[name] for name in start]
    return compare("changes of parameters", found, expected, FIT_TOLERANCE)


def plain_inputs(graph: NeuralGraph, method: str) -> object:
    """What the plain form of NG-GNN or NG-T reads."""
    from ngcore.bench import __main__ as bench
    from ngcore.reference.encoder import to_batch

    batch = to_batch([graph.map(lambda x: x.cpu())], bench.inr_frame()).to(graph.nodes[0].device)
    return batch if method == "NG-GNN" else [batch]


def singles(graph: NeuralGraph) -> list[NeuralGraph]:
    return [graph[n] for n in range(graph.num_networks)]
