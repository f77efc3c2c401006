"""INR classification (paper, section 4.1; tables 3 and 4): name the class of an image from the weights of its INR."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.data import siren
from ngcore.data.augment import Augmentation
from ngcore.data.images import load_images
from ngcore.data.inrs import INRSet, Recipe, fit_set
from ngcore.graph import Wiring, mlp
from ngcore.models import NGGNN, NGT
from ngcore.models.baselines import MLP, DWSNet, SetNN
from ngcore.study.runs import Record, StoredRun, cache_directory, tensor_digest
from ngcore.study.training import Schedule, train

CLASSES = 10
FASHION_LABELS = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Boot",
)
EVALUATION_BATCH = {"cpu": 64, "cuda": 256}
WIRING = mlp(siren.SIZES, "sine")


@dataclass(frozen=True)
class INRData:
    """Which INRs: the first `train + validation` of the train split, the last of them for validation, and `test`."""

    dataset: str
    train: int
    validation: int
    test: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Config:
    """One run: a method on a set of INRs with a seed.

    Args:
        method: a key of METHODS.
        probes: probe points of NG-GNN and NG-T.
        options: further arguments of the model, as pairs.
        recipe: "paper" for the paper's model, else what the tables call the variant that the options make.
    """

    dataset: str
    method: str
    probes: int
    seed: int
    data: INRData
    schedule: Schedule
    augmentation: Augmentation | None
    options: tuple[tuple[str, Any], ...] = ()
    recipe: str = "paper"
    task: str = "inr_classification"


METHODS: dict[str, Callable[..., nn.Module]] = {
    "MLP": MLP,
    "SetNN": SetNN,
    "DWSNet": DWSNet,
    "NG-GNN": NGGNN,
    "NG-T": NGT,
}


ROWS = (
    ("MLP", 0),
    ("SetNN", 0),
    ("DWSNet", 0),
    *((method, probes) for method in ("NG-GNN", "NG-T") for probes in (0, 4, 16, 64)),
)  # of tables 3 and 4: method and number of probe features


SMOOTH = 0.3  # scale of the Fourier frequencies in the rows "smooth": nearby weights get nearby features


def table_configs(
    data: INRData,
    schedule: Schedule,
    *,
    seeds: Mapping[int, int],
    micro_batch: Mapping[str, int],
    compiled: Collection[str],
    dropout: float,
    augmentation: Augmentation | None,
) -> list[Config]:
    """The runs of one table: the paper's eleven rows.

    Args:
        seeds: number of probe features -> number of seeds.
        micro_batch: method -> networks per forward and backward pass; the whole batch where not named.
        compiled: the methods that are compiled.
        dropout, augmentation: of all methods alike.
    """
    return [
        Config(
            data.dataset,
            method,
            probes,
            seed,
            data,
            replace(schedule, micro_batch=micro_batch.get(method, 0), compiled=method in compiled),
            augmentation,
            (("dropout", dropout),),
        )
        for method, probes in ROWS
        for seed in range(seeds[probes])
    ]


def smooth_configs(configs: Collection[Config], rows: Collection[tuple[str, int]]) -> list[Config]:
    """Of some rows (method, probes) the variant with smooth Fourier features, which is not the paper's."""
    return [
        replace(config, options=(*config.options, ("sigma", SMOOTH)), recipe="smooth")
        for config in configs
        if (config.method, config.probes) in rows
    ]


def build_model(method: str, probes: int = 0, wiring: Wiring = WIRING, **options: Any) -> nn.Module:
    """A metanetwork by the name of its method.

    Raises:
        ValueError: an unknown method, or probe features for one that has none.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if probes and not method.startswith("NG-"):
        raise ValueError(f"{method} takes no probe features, but probes = {probes}")
    return METHODS[method](wiring, CLASSES, **({"probes": probes} if probes else {}), **options)


def fit_inrs(data: INRData, *, workers: int | None = None, compiled: bool = False) -> dict[str, INRSet]:
    """The train, validation and test INRs; fitted where they are not stored yet.

    Args:
        workers: processes; None for one per core, or one with a GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = workers or (1 if device == "cuda" else torch.get_num_threads())
    sets = {
        split: fit_set(
            Recipe(data.dataset, split, data.steps, data.learning_rate),
            count,
            cache_directory(),
            device=device,
            workers=workers,
            compiled=compiled,
        )
        for split, count in (("train", data.train + data.validation), ("test", data.test))
    }
    return {
        "train": sets["train"][: data.train],
        "validation": sets["train"][data.train :],
        "test": sets["test"],
    }


def images_of(data: INRData, split: str) -> Float[Tensor, "n 28 28"]:
    """The images that a split's INRs were fitted to, 0 to 255."""
    count = {"train": data.train + data.validation, "test": data.test}[split]
    return load_images(data.dataset, split, count, cache=cache_directory()).pixels.float()


def row_of(record: Record) -> tuple[str, str, int]:
    """The table row that a run belongs to: data set, method, probe features."""
    config = record["config"]
    return config["dataset"], config["method"], config["probes"]


@cache
def load_data(data: INRData, device: str) -> tuple[dict[str, INRSet], str]:
    """The INRs on a device and the digest of all of them; kept for the process's further runs."""
    sets = fit_inrs(data, workers=1)
    tensors = (t for inrs in sets.values() for t in (*inrs.parameters.values(), inrs.labels))
    digest = tensor_digest(tensors)
    return {split: inrs.to(device) for split, inrs in sets.items()}, digest


class Classification:
    """The problem that the training loop solves (`ngcore.study.training.Problem`)."""

    def __init__(self, model: nn.Module, sets: dict[str, INRSet], augmentation: Augmentation | None) -> None:
        self.model, self.sets, self.augmentation = model, sets, augmentation
        self.train_size = len(sets["train"])
        model.fit_normalization(WIRING.graph(sets["train"].parameters))

    def loss(self, rows: Tensor) -> Tensor:
        train = self.sets["train"]
        parameters = {name: values[rows] for name, values in train.parameters.items()}
        if self.augmentation is not None:
            parameters = self.augmentation(parameters)
        return F.cross_entropy(self.model(WIRING.graph(parameters)).float(), train.labels[rows], reduction="sum")

    def logits(self, split: str) -> Tensor:
        """Class scores of every INR of a split, (n, classes), in evaluation batches of one size."""
        inrs = self.sets[split]
        size = EVALUATION_BATCH[inrs.labels.device.type]
        scores = []
        for first in range(0, len(inrs), size):
            rows = torch.arange(first, first + size, device=inrs.labels.device).clamp(max=len(inrs) - 1)
            scores.append(self.model(WIRING.graph({name: v[rows] for name, v in inrs.parameters.items()})).float())
        return torch.cat(scores)[: len(inrs)]

    def validate(self) -> dict[str, float]:
        scores, labels = self.logits("validation"), self.sets["validation"].labels
        accuracy = (scores.argmax(1) == labels).float().mean().item()
        return {
            "val_loss": F.cross_entropy(scores, labels).item(),
            "val_score": accuracy,
            "val_accuracy": accuracy,
        }

    def test(self) -> dict[str, Any]:
        scores, labels = self.logits("test"), self.sets["test"].labels
        predicted = scores.argmax(1)
        confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.long, device=labels.device)
        confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
        return {
            "test_loss": F.cross_entropy(scores, labels).item(),
            "test_accuracy": (predicted == labels).float().mean().item(),
            "test_confusion": confusion.tolist(),
        }


def run(config: Config, on_epoch: Callable[[int, Record], None] = lambda epoch, scores: None) -> Record:
    """The result of a run: read if it is stored, else trained (from its checkpoint, if there is one) and stored."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sets, digest = load_data(config.data, device)
    stored = StoredRun.of(config, digest, cache_directory())
    record = stored.result()
    if record is not None:
        return record
    torch.manual_seed(config.seed)
    model = build_model(config.method, config.probes, **dict(config.options)).to(device)
    problem = Classification(model, sets, config.augmentation)
    return train(problem, config.schedule, config.seed, stored, on_epoch)
