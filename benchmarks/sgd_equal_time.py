"""SGD of Figure 3 given (at least) the processor time of exact SFN: does it catch up?

    python benchmarks/sgd_equal_time.py --runs FOLDER [--epochs 2000] [--cifar10 FOLDER]

Takes the settings that the random search of a finished ``lightning-sfn reproduce fig3 --output FOLDER`` chose for the
largest network, and trains for many more epochs. Writes `benchmarks/results/sgd_equal_time.json`.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import record
import torch

from lightning_sfn.experiments.figure3 import FIGURE
from lightning_sfn.experiments.figure3_runs import newton_run, sgd_run

HIDDEN = 50


def main() -> None:
    """Runs the seeds and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--cifar10")
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = json.loads((options.runs / "fig3.json").read_text())
    settings = FIGURE.scales["small"]
    sources = {"mnist": "sample"} | ({"cifar10": options.cifar10} if options.cifar10 else {})
    rows = []
    for dataset, source in sources.items():
        shared = {"dataset": dataset, "source": source, "hidden": HIDDEN, "device": "cpu"}
        begun = time.process_time()
        newton_run(**shared, method="saddle_free", seed=0, settings=settings)
        newton_seconds = time.process_time() - begun
        chosen = whole["result"]["search"][f"{dataset}-{HIDDEN}"]
        for seed in range(whole["seeds"]):
            begun = time.process_time()
            longer = replace(settings, sgd_epochs=options.epochs)
            run = sgd_run(**shared, **chosen, seed=seed, settings=longer, probes=0)
            seconds = time.process_time() - begun
            row = {"dataset": dataset, "seed": seed, "sgd_seconds": seconds, "sgd_error": min(run["errors"])}
            rows.append(row | {"sgd_loss": min(run["losses"]), "newton_seconds": newton_seconds})
    print(record.write("sgd_equal_time", {"settings": {"epochs": options.epochs, "hidden": HIDDEN}, "runs": rows}))


if __name__ == "__main__":
    main()
