"""Make the shipped learned optimizers again, from a profile's stored meta-training runs.

    python data/make_optimizers.py [--profile P]

Writes `data/optimizers/<method>.safetensors` for every meta-training run under data/results/<profile>/ whose weights
lie in the cache, as they do after `./run_all.sh --profile P --only 04`.
"""

import argparse

from ngcore.models.optimizers import LearnedOptimizer
from ngcore.study import runs
from ngcore.tasks.optimizer_files import SHIPPED, save


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the shipped learned optimizers again.")
    parser.add_argument("--profile", default="cpu", help="whose stored runs are taken")
    profile = parser.parse_args().profile
    for record in runs.published(runs.results_directory(profile), "meta_training"):
        config, metrics = record["config"], record["metrics"]
        directory = runs.cache_directory() / "runs" / record["hash"]
        rule = LearnedOptimizer(config["method"], **dict(config["options"]))
        rule.load_state_dict(runs.StoredRun(directory, config, record["data"]).weights())
        about = config | record["environment"] | {"best_step": metrics["best_step"], "run": record["hash"]}
        save(rule, SHIPPED / f"{config['method']}.safetensors", about)
        print(f"{config['method']}: {config['outer_steps']} outer steps, best after {metrics['best_step']}")


if __name__ == "__main__":
    main()
