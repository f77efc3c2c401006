"""Sets of INRs fitted to an image set: fitted here, stored in shards, found again.

A set is a function of its recipe, up to rounding: fits that are compiled, or on another device, differ in their last
digits, so runs that are to read the same networks share one stored set. It lives in `<cache>/inrs/<recipe>/`, one
safetensors file per SHARD networks, each written whole or not at all, so that a killed fit goes on with the shard that
it was at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ngcore.data.images.subsets import Images, load_images
from ngcore.data.inrs import siren
from ngcore.files import write_atomically
from ngcore.processes import completed, in_turn

MAX_IMAGES = 100_000  # more than any split holds
SHARD = 256  # networks per file
# Networks per tensor program. On a CPU the working set stays in its cache. On a GPU, whole shards: 0.4 GB for every
# value of all hidden neurons at all pixels, of which a step keeps some ten.
BATCH = {"cpu": 16, "cuda": 16 * SHARD}

# Of each parameter over the published training sets (data/README.md): mean, 0.0 for "near 0", and deviation.
PUBLISHED = {
    "mnist": ((0.0, 0.0628), (0.0, 0.0213), (0.0, 0.0183), (0.0, 0.0110), (0.0, 0.1179), (-0.0124, 0.0999)),
    "fashion_mnist": ((0.0, 0.0782), (0.0, 0.0286), (0.0, 0.0324), (0.0, 0.0167), (0.0, 0.1345), (-0.0203, 0.0960)),
}


@dataclass(frozen=True)
class Recipe:
    """What a set of INRs is: the images it renders, in the order of their split, and how it was fitted."""

    dataset: str
    split: str
    steps: int
    learning_rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.dataset}_{self.split}_{self.steps}steps_lr{self.learning_rate:g}_seed{self.seed}"

    def initial_seeds(self, index: Tensor) -> list[int]:
        """A seed for every image's network, its own within the data set: no two of train and test share one."""
        first = self.seed * 2 * MAX_IMAGES + (MAX_IMAGES if self.split == "test" else 0)
        return (first + index).tolist()


@dataclass(frozen=True)
class INRSet:
    """INRs with what they render.

    Shapes:
        parameters: `layers.<i>.weight` (n, out, in), `layers.<i>.bias` (n, out)
        labels, index: (n,) class of the image and its position in the official split
        psnr: (n,) dB
    """

    parameters: dict[str, Tensor]
    labels: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    psnr: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shapes = {name: tuple(values.shape[1:]) for name, values in self.parameters.items()}
        weights = [shape for name, shape in shapes.items() if name.endswith("weight")]
        layers = "-".join(map(str, (weights[0][1], *(shape[0] for shape in weights))))
        count = sum(math.prod(shape) for shape in shapes.values())
        return (
            f"INRSet: {len(self):,} INRs of layers {layers}, {count:,} parameters each, on {self.psnr.device}\n"
            f"  classes {sorted(set(self.labels.tolist()))}, PSNR {self.psnr.mean():.1f} dB on average"
        )

    def __getitem__(self, rows: slice) -> INRSet:
        parameters = {name: tensor[rows] for name, tensor in self.parameters.items()}
        return INRSet(parameters, self.labels[rows], self.index[rows], self.psnr[rows])

    def to(self, device: str) -> INRSet:
        parameters = {name: tensor.to(device) for name, tensor in self.parameters.items()}
        return INRSet(parameters, self.labels.to(device), self.index.to(device), self.psnr.to(device))


def layer_statistics(inrs: INRSet) -> list[tuple[str, float, float]]:
    """(parameter, mean, standard deviation) over the set, in the order of PUBLISHED."""
    return [(name, values.mean().item(), values.std().item()) for name, values in inrs.parameters.items()]


def _read_shard(path: Path) -> INRSet:
    try:
        tensors = load_file(path)
        parameters = {name: tensors[name] for name in siren.SHAPES}
        labels, index, reached = (tensors[name] for name in ("labels", "index", "psnr"))
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a shard of INRs ({error}); delete it and fit again") from error
    if not len(labels) == len(index) == len(reached):
        raise ValueError(f"{path}: labels, index and psnr have different lengths; delete the file and fit again")
    inrs = INRSet(parameters, labels, index, reached)
    for name, shape in siren.SHAPES.items():
        values = inrs.parameters[name]
        if tuple(values.shape) != (len(inrs), *shape):
            raise ValueError(f"{path}: {name} has shape {tuple(values.shape)}, not ({len(inrs)}, *{shape})")
        if not torch.isfinite(values).all():
            raise ValueError(f"{path}: {name} holds values that are not finite; delete the file and fit again")
    return inrs


def _write_shard(path: Path, inrs: INRSet) -> None:
    tensors = dict(inrs.parameters) | {"labels": inrs.labels, "index": inrs.index, "psnr": inrs.psnr}
    write_atomically(
        path, safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    )


@dataclass(frozen=True)
class _Batch:
    """Work for one tensor program. A compiled program has one shape, so a short batch repeats its last image."""

    recipe: Recipe
    images: Images
    device: str
    compiled: bool

    def fit(self) -> INRSet:
        count = len(self.images)
        rows = torch.arange(BATCH[self.device] if self.compiled else count).clamp(max=count - 1)
        fit = siren.fit_sirens(
            self.images.pixels[rows].to(self.device).float() / 255,
            siren.initialize(self.recipe.initial_seeds(self.images.index[rows])).to(self.device),
            steps=self.recipe.steps,
            learning_rate=self.recipe.learning_rate,
            compiled=self.compiled,
        )
        parameters = {name: values[:count].cpu() for name, values in fit.parameters.items()}
        return INRSet(parameters, self.images.labels, self.images.index, fit.psnr[:count].cpu())


@dataclass(frozen=True, eq=False)
class _Work:
    """Shards that are fitted together, and the batches that they are fitted in: those of a shard, or shards of one."""

    shards: tuple[tuple[Path, int], ...]
    batches: tuple[_Batch, ...]

    @classmethod
    def on(
        cls, shards: Sequence[tuple[Path, range]], recipe: Recipe, images: Images, device: str, compiled: bool
    ) -> _Work:
        rows = [row for _, shard in shards for row in shard]
        cuts = [rows[i : i + BATCH[device]] for i in range(0, len(rows), BATCH[device])]
        own = [Images(images.pixels[cut], images.labels[cut], images.index[cut]) for cut in cuts]  # copies, not views
        batches = tuple(_Batch(recipe, some, device, compiled) for some in own)
        return cls(tuple((path, len(shard)) for path, shard in shards), batches)

    def write(self, parts: Sequence[INRSet]) -> None:
        """Store all shards, given what the batches gave."""
        inrs, first = _concatenate(parts), 0
        for path, count in self.shards:
            _write_shard(path, inrs[first : first + count])
            first += count


def _concatenate(parts: Sequence[INRSet]) -> INRSet:
    return INRSet(
        {name: torch.cat([part.parameters[name] for part in parts]) for name in siren.SHAPES},
        torch.cat([part.labels for part in parts]),
        torch.cat([part.index for part in parts]),
        torch.cat([part.psnr for part in parts]),
    )


def fit_set(
    recipe: Recipe, count: int, cache: Path, *, device: str = "cpu", workers: int = 1, compiled: bool = False
) -> INRSet:
    """The first `count` INRs of a recipe: read where stored, fitted and stored where not.

    Args:
        workers: processes that fit at the same time, each on one core (Python threads would wait for each other);
            1 fits in this process, on all of its threads.
        compiled: compile the optimizer step: about twice as fast after some ten seconds.

    Raises:
        ValueError: a stored shard is damaged; the error names the file.
        OSError: the cache can't be written.
    """
    images = load_images(recipe.dataset, recipe.split, count, cache=cache)
    directory = cache / "inrs" / recipe.name
    directory.mkdir(parents=True, exist_ok=True)
    rows = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
    paths = [directory / f"{shard[0]:06d}_{shard[-1]:06d}.safetensors" for shard in rows]
    missing = [(path, shard) for path, shard in zip(paths, rows, strict=True) if not path.exists()]
    together = max(1, BATCH[device] // SHARD)
    groups = [missing[i : i + together] for i in range(0, len(missing), together)]
    work = [_Work.on(group, recipe, images, device, compiled) for group in groups]
    _fit_and_store(work, workers, f"fitting {recipe.dataset} INRs ({recipe.split})")
    inrs = _concatenate([_read_shard(path) for path in paths])
    if not (torch.equal(inrs.index, images.index) and torch.equal(inrs.labels, images.labels)):
        raise ValueError(
            f"{directory} holds INRs of other images than {recipe.dataset} {recipe.split}; delete it and fit again"
        )
    return inrs


def _fit_and_store(work: Sequence[_Work], workers: int, title: str) -> None:
    """Fit all batches and write shards as soon as their own are fitted."""
    batches = [(own, batch) for own in work for batch in own.batches]
    items = [(batch,) for _, batch in batches]
    parts: dict[_Work, dict[int, INRSet]] = {own: {} for own in work}
    fitted, psnr = 0, 0.0
    ended = in_turn(_Batch.fit, items) if workers == 1 else completed(_Batch.fit, items, workers)
    total = sum(len(batch.images) for _, batch in batches)
    with tqdm(total=total, desc=title, unit="INR", disable=not work) as bar:
        for number, future in ended:
            own, part = batches[number][0], future.result()
            parts[own][number] = part
            fitted, psnr = fitted + len(part), psnr + part.psnr.sum().item()
            bar.update(len(part))
            bar.set_postfix_str(f"mean PSNR {psnr / fitted:.2f} dB")
            if len(parts[own]) == len(own.batches):
                found = parts.pop(own)
                own.write([found[i] for i in sorted(found)])
