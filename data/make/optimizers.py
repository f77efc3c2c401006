"""Make the shipped learned optimizers again, from a profile's stored meta-training runs.

    python data/make/optimizers.py [--profile P]

Writes `data/optimizers/<method>.safetensors` for every meta-training run under data/results/<profile>/. Their weights
must lie in the cache, as they do after `./run_all.sh --profile P --only 04`.
"""

import argparse

from ngcore.models.optimizers.files import OPTIMIZERS, save
from ngcore.study import runs
from ngcore.tasks.meta_training import trained


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the shipped learned optimizers again.")
    parser.add_argument("--profile", default="cpu", help="whose stored runs are taken")
    directory = runs.results_directory(parser.parse_args().profile)
    found = [trained(record["hash"]) for record in runs.published(directory, "meta_training")]
    for rule, record in found:  # all of them can be read
        steps = {"best_step": record["metrics"]["best_step"], "run": record["hash"]}
        path = OPTIMIZERS / f"{rule.method}.safetensors"
        save(rule, path, record["config"] | record["environment"] | steps)
        print(f"{path}: best of {record['config']['outer_steps']} outer steps after {steps['best_step']}")


if __name__ == "__main__":
    main()
