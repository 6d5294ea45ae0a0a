"""SGD of Figure 3 given (at least) the processor time of exact SFN: does it catch up?

    python benchmarks/sgd_equal_time.py --runs FOLDER [--epochs 2000]

Takes data, sizes, and the settings that the random search chose for the largest network, from a finished
``lightning-sfn reproduce fig3 --output FOLDER``, and trains for many more epochs. Writes
`benchmarks/results/sgd_equal_time.json`.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import record
import torch

from lightning_sfn.experiments.figure3_runs import Settings, newton_run, sgd_run


def main() -> None:
    """Runs the seeds and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = json.loads((options.runs / "fig3.json").read_text())
    run = json.loads((options.runs / "settings.json").read_text())
    settings = Settings(**run["settings"] | {"hidden": tuple(run["settings"]["hidden"])})
    sources = {name: source for name, source in run["sources"].items() if source is not None}
    hidden = max(settings.hidden)
    rows = []
    for dataset, source in sources.items():
        shared = {"dataset": dataset, "source": source, "hidden": hidden, "device": "cpu"}
        begun = time.process_time()
        newton_run(**shared, method="saddle_free", seed=0, settings=settings)
        newton_seconds = time.process_time() - begun
        chosen = whole["result"]["search"][f"{dataset}-{hidden}"]
        for seed in range(whole["seeds"]):
            begun = time.process_time()
            longer = replace(settings, sgd_epochs=options.epochs)
            longest = sgd_run(**shared, **chosen, seed=seed, settings=longer, probes=0)
            seconds = time.process_time() - begun
            row = {"dataset": dataset, "seed": seed, "sgd_seconds": seconds, "sgd_error": min(longest["errors"])}
            rows.append(row | {"sgd_loss": min(longest["losses"]), "newton_seconds": newton_seconds})
    print(record.write("sgd_equal_time", {"settings": {"epochs": options.epochs, "hidden": hidden}, "runs": rows}))


if __name__ == "__main__":
    main()
