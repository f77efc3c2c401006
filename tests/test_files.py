"""What is stored is whole or not there: on a full disk, and where nothing may be written."""

import errno
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from ngcore.bench import harness
from ngcore.data.images import sources
from ngcore.data.inrs import sets as inrs
from ngcore.data.inrs import siren
from ngcore.data.zoos import populations
from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.files import write_atomically
from ngcore.models.optimizers import LearnedOptimizer
from ngcore.models.optimizers import files as optimizer_files
from ngcore.study import runs


@contextmanager
def small_files(size=256):
    """A disk on which no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def some_inrs():
    return inrs.INRSet(siren.unflatten(siren.initialize(range(4))), torch.arange(4), torch.arange(4), torch.ones(4))


def some_networks():
    architecture = Architecture((3, 4, 4), (3, 3), (1, 1), (1, 1), ("relu", "relu"), (-1, -1))
    state = {name: values.unsqueeze(0) for name, values in CNN(architecture).state_dict().items()}
    return populations.Checkpoints(architecture, state, ({"network": 0, "run": 0, "accuracy": 0.1},))


def a_run(directory):
    return runs.StoredRun(directory, {"task": "writing"}, {"task": "writing"}, "no data")


WEIGHTS = {"weight": torch.zeros(100, 100)}
WRITERS = {
    "text": lambda path: write_atomically(path, 1000 * "text"),
    "INRs": lambda path: inrs._write_shard(path, some_inrs()),
    "networks": lambda path: populations.write_part(path, some_networks()),
    "images": lambda path: sources._save(path, np.zeros((9, 28, 28))),
    "optimizer": lambda path: optimizer_files.save(LearnedOptimizer("FF"), path, {}),
    "timings": lambda path: harness.write_json([harness.Result("fit", "steps/s", 30.0, 2.0, 1.0, 4.0)] * 9, path),
    "checkpoint.pt": lambda path: a_run(path.parent).save_checkpoint(WEIGHTS),
    "weights.safetensors": lambda path: a_run(path.parent).finish({}, WEIGHTS, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_the_old_file_stays_and_the_error_names_it(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    with small_files(), pytest.raises(OSError, match=f"not written: File too large.*{path}") as raised:
        WRITERS[name](path)
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_what_fits_is_written(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size > 256


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=str(tmp_path / "file")):
        write_atomically(tmp_path / "file" / "below", "text")
