"""Make the shipped learned optimizers again, from a profile's stored meta-training runs.

    python data/make/optimizers.py [--profile P]

Writes `data/optimizers/<method>.safetensors` for every method that has meta-training runs under
data/results/<profile>/: the one with the best validation. Their weights must lie in the cache, as they do after
`python -m ngcore.study train --profile P --only 04`.
"""

import argparse
from collections.abc import Sequence

from ngcore.models.optimizers.files import OPTIMIZERS, save
from ngcore.study import runs
from ngcore.study.runs import Record
from ngcore.tasks.meta_training import best_runs, trained


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the shipped learned optimizers again.")
    parser.add_argument("--profile", default="cpu", help="whose stored runs are taken")
    directory = runs.results_directory(parser.parse_args(arguments).profile)
    best = best_runs(runs.published(directory, ("meta_training",)))
    found = [trained(record["hash"]) for record in best]
    for rule, record in found:  # all of them can be read
        save(rule, OPTIMIZERS / f"{rule.method}.safetensors", _provenance(record))
        config, metrics = record["config"], record["metrics"]
        told = f"{rule.method}: meta-seed {config['seed']}, best of {config['outer_steps']} outer steps"
        print(f"{told} after {metrics['best_step']}: {max(metrics['val_score']):.4f}")


def _provenance(record: Record) -> dict[str, object]:
    own = {"best_step": record["metrics"]["best_step"], "run": record["hash"]}
    return record["config"] | record["environment"] | own


if __name__ == "__main__":
    main()
