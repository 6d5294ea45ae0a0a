"""The main recipe over several seeds: plateau, switch, escape, and what it cost.

    python benchmarks/autoencoder_escape.py [--seeds 5] [--plot docs/escape.png]

Runs `recipes/autoencoder.yaml` once for each seed, writes `benchmarks/results/autoencoder_escape.json`, and can draw
the picture of the README from the first seed.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sfn import SwitchToSFN
from lightning_sfn.cli import SFNCommand, run

RECIPE = Path(__file__).parent.parent / "recipes" / "autoencoder.yaml"
CURVES = ("train_loss", "hessian/lambda_min", "hessian/lambda_max", "sfn/loss_after")


def main() -> None:
    """Runs the seeds and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0")
    parser.add_argument("--plot", type=Path, help="where to draw the first seed")
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["fit", "-c", str(RECIPE), f"--seed_everything={seed}", "--trainer.enable_progress_bar=false"]
            command = run([*arguments, f"--trainer.logger.init_args.save_dir={folder}"])
            runs.append(summary(seed, command))
    if options.plot:
        draw(runs[0], options.plot)
    print(record.write("autoencoder_escape", {"runs": runs}))


def summary(seed: int, command: SFNCommand) -> dict[str, Any]:
    """The numbers of one run, and its curves."""
    callback = next(c for c in command.trainer.callbacks if isinstance(c, SwitchToSFN))
    report = callback.report
    assert report is not None, f"seed {seed} never switched"
    assert report.spectrum_at_switch is not None
    assert report.spectrum_at_end is not None
    events = EventAccumulator(command.trainer.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    return {
        "seed": seed,
        "plateau": report.plateau,
        "final": report.final,
        "first_steps": report.first_steps,
        "first_seconds": report.first_seconds,
        "newton_steps": report.newton_steps,
        "accepted_steps": report.accepted_steps,
        "newton_seconds": report.newton_seconds,
        "products": report.products,
        "lambda_min": [report.spectrum_at_switch.lambda_min, report.spectrum_at_end.lambda_min],
        "lambda_max": [report.spectrum_at_switch.lambda_max, report.spectrum_at_end.lambda_max],
        "switched_at_step": callback.switched_at_step,
        "curves": {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in CURVES},
    }


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Training loss, and the ends of the Hessian's spectrum, against the optimizer steps of the loader."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss_axis, eigen_axis) = plt.subplots(2, 1, sharex=True, figsize=(7.5, 5.5), layout="constrained")
    for axis in (loss_axis, eigen_axis):
        axis.axvline(numbers["switched_at_step"], color="0.6", linestyle="--", linewidth=1)
        axis.grid(alpha=0.3)
    loss_axis.plot(*zip(*numbers["curves"]["train_loss"], strict=True), color="C0")
    loss_axis.set_ylabel("training loss\n(squared error per image)")
    loss_axis.annotate(
        "SwitchToSFN", (numbers["switched_at_step"], loss_axis.get_ylim()[0]), (5, 5), textcoords="offset points"
    )
    for end, colour in (("lambda_min", "C3"), ("lambda_max", "C2")):
        eigen_axis.plot(*zip(*numbers["curves"][f"hessian/{end}"], strict=True), color=colour, marker=".", label=end)
    eigen_axis.set_yscale("symlog", linthresh=1e-3)
    eigen_axis.axhline(0, color="0.3", linewidth=0.8)
    eigen_axis.set_ylabel("eigenvalue ends\n(symlog)")
    eigen_axis.set_xlabel("loader batches")
    eigen_axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
