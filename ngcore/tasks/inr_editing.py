"""INR editing (paper, section 4.1; table 5, figure 2c): change an INR's weights so that it draws the edited image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.data.inrs import siren
from ngcore.data.inrs.edits import EDITS
from ngcore.data.inrs.sets import BATCH, INRSet, Recipe
from ngcore.data.inrs.siren import render
from ngcore.digests import tensor_digest
from ngcore.graph import Wiring
from ngcore.models import NGGNN, NGT, Editor, PerParameter
from ngcore.models.baselines import ConstantEdit, EquivariantDWSNet, EquivariantNFN, PictureFilter
from ngcore.study.execution import Execution
from ngcore.study.methods import Method
from ngcore.study.plans import Plan, Runs
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.study.training import Schedule, by_training
from ngcore.tasks.editing_pictures import encode, example_rows
from ngcore.tasks.inr_sets import WIRING, INRData, build, data_of, evaluation_batches, fit_inrs, images_of, load_data
from ngcore.tasks.rows import PAPER, Row, rows_of
from ngcore.tasks.variants import changed

Drawing = Callable[[str], Float[Tensor, "n side side"]]  # (split) -> what its INRs draw after an edit


@dataclass(frozen=True)
class Config:
    """One run: a method that edits INRs of one data set, with a seed.

    Args:
        method: a key of METHODS.
        probes: probe points of NG-GNN and NG-T.
        networks: how many networks a method makes of one, whose renderings are averaged.
        edit: a key of `ngcore.data.inrs.edits.EDITS`.
        transfer: INRs of another data set, whose test split is edited as well; None for none.
        options: further arguments of the model, as pairs.
        recipe: "paper" for the paper's model and training but for the scale, else what this one is called.
    """

    dataset: str
    method: str
    probes: int
    networks: int
    edit: str
    seed: int
    data: INRData
    transfer: INRData | None
    schedule: Schedule
    options: tuple[tuple[str, Any], ...] = ()
    recipe: str = PAPER
    task: str = "inr_editing"


def _ng_gnn(wiring: Wiring, networks: int, sigma: float | None = None, **options: Any) -> Editor:
    """Weights and biases enter through Linears, without Fourier features, as in the public editing model."""
    return Editor(NGGNN(wiring, PerParameter(networks), sigma=sigma, **options))


def _ng_t(wiring: Wiring, networks: int, sigma: float | None = 3.0, dropout: float = 0.3, **options: Any) -> Editor:
    return Editor(NGT(wiring, PerParameter(networks), sigma=sigma, dropout=dropout, **options))


def _baseline(model: Callable[..., nn.Module], wiring: Wiring, networks: int, **options: Any) -> Editor:
    return Editor(model(wiring, networks, **options))


def _constant_edit(wiring: Wiring, networks: int) -> ConstantEdit:
    if networks != 1:
        raise ValueError(f"the constant edit makes one network of one, not {networks}")
    return ConstantEdit(wiring)


METHODS = {
    "no edit": Method(is_control=True),
    "constant edit": Method(_constant_edit, colour=1, is_control=True),
    "3x3 filter": Method(colour=5, is_control=True),
    "fitted to the target": Method(colour=7, is_control=True),
    "DWSNet": Method(partial(_baseline, EquivariantDWSNet), colour=2),
    "DWSNet_mean": Method(partial(_baseline, EquivariantDWSNet, reduction="mean"), colour=9),  # not the paper's
    "NFN_HNP": Method(partial(_baseline, EquivariantNFN, group="HNP"), colour=4),
    "NFN_NP": Method(partial(_baseline, EquivariantNFN, group="NP"), colour=8),
    "NG-GNN": Method(_ng_gnn, colour=0, probes=True, micro_batch=8),
    "NG-T": Method(_ng_t, colour=3, probes=True, micro_batch=4),
}
CONTROLS = tuple(name for name, method in METHODS.items() if method.is_control)  # none of them reads an INR's weights


def row_config(
    row: Row,
    data: INRData,
    transfer: INRData | None,
    schedule: Schedule,
    *,
    dropout: Mapping[str, float],
) -> Config:
    """The run of a table's row: dilation by one network in place of one, where the row does not say otherwise.

    Args:
        dropout: method -> probability; the model's own where not named.
    """
    options = (("dropout", dropout[row.method]),) if row.method in dropout else ()
    config = Config(
        data.dataset, row.method, row.probes, 1, "dilation", row.seed, data, transfer, schedule, options, row.recipe
    )
    return changed(config, **row.changes)


def build_editor(method: str, probes: int = 0, networks: int = 1, **options: Any) -> Editor | ConstantEdit:
    """An editor by the name of its method; raises as `inr_sets.build`."""
    return build(METHODS, method, probes, WIRING, networks, **options)


def rendered(model: nn.Module, parameters: Mapping[str, Tensor]) -> Float[Tensor, "n side side"]:
    """What edited INRs draw: the mean over the networks that the editor makes of each."""
    edited = model(WIRING.graph(parameters)).state_dict()
    return render({name: values.float() for name, values in edited.items()}).mean(0)


def drawn(
    draw: Callable[[dict[str, Tensor]], Float[Tensor, "batch side side"]], inrs: INRSet
) -> Float[Tensor, "n side side"]:
    """A picture of every INR of a set, in evaluation batches of one size."""
    parts = [
        draw({name: values[rows] for name, values in inrs.parameters.items()}) for rows in evaluation_batches(inrs)
    ]
    return torch.cat(parts)[: len(inrs)]


def error(drawn: Tensor, wanted: Tensor) -> Float[Tensor, " n"]:
    """Mean squared error of every image."""
    return (drawn - wanted).square().mean(dim=(1, 2))


@dataclass(frozen=True)
class Pictures:
    """What a run reads: INRs with the edited images that they are to draw, by split: "train", "validation" and "test",
    and where there is another data set, its test INRs as "transfer"."""

    sets: Mapping[str, INRSet]
    targets: Mapping[str, Float[Tensor, "n side side"]]

    def errors(self, draw: Drawing) -> dict[str, Any]:
        """Of the tested splits the mean error and every INR's, to four digits; and pictures of some test INRs."""
        found: dict[str, Any] = {}
        for split in [name for name in ("test", "transfer") if name in self.sets]:
            pictures = draw(split)
            own = error(pictures, self.targets[split])
            found[f"{split}_mse"] = own.mean().item()
            found[f"{split}_errors"] = [float(f"{value:.4g}") for value in own.tolist()]
            if split == "test":
                found |= self.examples(pictures)
        return found

    def examples(self, edited: Float[Tensor, "n side side"]) -> dict[str, Any]:
        """What is shown of the test INRs: which, what they draw, what they should draw, and what edited ones do."""
        inrs, rows = self.sets["test"], example_rows(self.sets["test"].labels)
        before = render({name: values[rows] for name, values in inrs.parameters.items()})
        pictures = {"unedited": before, "target": self.targets["test"][rows], "edited": edited[rows]}
        texts = {f"examples_{name}": encode(own) for name, own in pictures.items()}
        return {"example_rows": rows.tolist(), **texts}


class Editing:
    """The problem that the training loop solves (`ngcore.study.training.Problem`)."""

    def __init__(self, model: nn.Module, pictures: Pictures) -> None:
        self.model, self.pictures = model, pictures
        train = pictures.sets["train"]
        self.train_size = len(train)
        model.fit_normalization(WIRING.graph(train.parameters))

    def loss(self, rows: Tensor) -> Tensor:
        parameters = {name: values[rows] for name, values in self.pictures.sets["train"].parameters.items()}
        return error(rendered(self.model, parameters), self.pictures.targets["train"][rows]).sum()

    def draw(self, split: str) -> Float[Tensor, "n side side"]:
        return drawn(partial(rendered, self.model), self.pictures.sets[split])

    def validate(self) -> dict[str, float]:
        found = error(self.draw("validation"), self.pictures.targets["validation"]).mean().item()
        return {"val_loss": found, "val_score": -found}

    def test(self) -> dict[str, Any]:
        return self.pictures.errors(self.draw)


# Controls that nothing is trained for


def _no_edit(config: Config, pictures: Pictures, job: Job) -> Drawing:
    """The INRs as they are."""
    return lambda split: drawn(render, pictures.sets[split])


def _picture_filter(config: Config, pictures: Pictures, job: Job) -> Drawing:
    """The best linear filter of the training INRs' pictures, on those of others: no weight is edited."""
    shown, wanted = drawn(render, pictures.sets["train"]), pictures.targets["train"]
    best = PictureFilter.fit(zip(shown.split(256), wanted.split(256), strict=True))
    return lambda split: best(drawn(render, pictures.sets[split]))


def _fitted(config: Config, pictures: Pictures, job: Job) -> Drawing:
    """INRs that are fitted to the edited images, from the same starts and by the same recipe: what networks of this
    size can draw after so many steps."""

    def draw(split: str) -> Float[Tensor, "n side side"]:
        inrs, wanted = pictures.sets[split], pictures.targets[split]
        data = config.transfer if split == "transfer" else config.data
        recipe = Recipe(data.dataset, "test", data.steps, data.learning_rate)
        parts = []
        for first in range(0, len(inrs), BATCH[job.device]):
            job.execution.leave_in_time()
            rows = torch.arange(first, first + BATCH[job.device]).clamp(max=len(inrs) - 1)  # one shape is compiled
            start = siren.initialize(recipe.initial_seeds(inrs.index.cpu()[rows])).to(job.device)
            settings = {"steps": recipe.steps, "learning_rate": recipe.learning_rate, "compiled": job.compiled}
            parts.append(render(siren.fit_sirens(wanted[rows.to(wanted.device)], start, **settings).parameters))
        return torch.cat(parts)[: len(inrs)]

    return draw


UNTRAINED: dict[str, Callable[[Config, Pictures, Job], Drawing]] = {
    "no edit": _no_edit,
    "3x3 filter": _picture_filter,
    "fitted to the target": _fitted,
}


@cache
def targets_of(data: INRData, edit: str, device: str) -> dict[str, Float[Tensor, "n side side"]]:
    """The edited images of every split on a device; kept for the process's further runs.

    Raises:
        ValueError: an unknown edit.
    """
    if edit not in EDITS:
        raise ValueError(f"unknown edit {edit!r}; there are {', '.join(EDITS)}")
    return {split: EDITS[edit](images).to(device) for split, images in images_of(data).items()}


def load(config: Config, device: str) -> tuple[Pictures, str]:
    """The INRs and edited images of a run, and their digest."""
    sets, digest = load_data(config.data, device)
    targets = targets_of(config.data, config.edit, device)
    digests = [tensor_digest(targets.values())]
    if config.transfer is not None:
        others, other_digest = load_data(config.transfer, device)
        sets = sets | {"transfer": others["test"]}
        targets = targets | {"transfer": targets_of(config.transfer, config.edit, device)["test"]}
        digests = [other_digest, *digests]
    return Pictures(sets, targets), "+".join([digest, *digests])


def problem_of(config: Config, pictures: Pictures, device: str) -> Editing:
    """What the training loop solves."""
    model = build_editor(config.method, config.probes, config.networks, **dict(config.options)).to(device)
    return Editing(model, pictures)


_by_training = by_training(problem_of)


def produce(config: Config, pictures: Pictures, job: Job) -> Outcome:
    """Train an editor, or measure a control that nothing is trained for."""
    if config.method not in UNTRAINED:
        return _by_training(config, pictures, job)
    started = time.monotonic()
    with torch.no_grad():
        metrics = pictures.errors(UNTRAINED[config.method](config, pictures, job))
    return Outcome(metrics, {}, time.monotonic() - started)


def prepare(configs: Sequence[Config], execution: Execution) -> None:
    """Fit the INRs that runs read, by all workers."""
    read = [data for config in configs for data in (config.data, config.transfer) if data is not None]
    for data in dict.fromkeys(read):
        fit_inrs(data, workers=execution.workers, compiled=execution.compiles())


EXPERIMENT = Experiment(Config, METHODS, load, produce, prepare)


def data_sets(parameters: Mapping[str, Any]) -> tuple[INRData, INRData]:
    """The INRs that a notebook's parameters ask for, and those that editors are tested on besides: there only test INRs
    are read, so one for training and one for validation are enough of a set."""
    data, transfer = (data_of(parameters, parameters[name]) for name in ("dataset", "transfer"))
    return data, replace(transfer, train=1, validation=1)


def runs(parameters: Mapping[str, Any]) -> Runs:
    """Table 5 and what is beyond it, row by row."""
    shared = {name: parameters[name] for name in ("warmup", "decay", "clip", "precision")}
    schedule = Schedule(parameters["epochs"], parameters["batch"], parameters["learning_rate"], **shared)
    base = *data_sets(parameters), schedule
    return (yield [row_config(row, *base, dropout=parameters["dropout"]) for row in rows_of(parameters["rows"])])


PLAN = Plan(runs, ("inr_editing",))
