"""Figure 4: the deep autoencoder (a, b) and the recurrent network (c, d)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_sfn.experiments import figure4_autoencoder as autoencoder
from lightning_sfn.experiments import figure4_recurrent as recurrent
from lightning_sfn.experiments.figure import Context, Figure, Verdict, new_canvas
from lightning_sfn.experiments.runner import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["FIGURE", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Sizes of both experiments.

    Attributes:
        autoencoder: Of panels (a) and (b).
        recurrent: Of panels (c) and (d).
    """

    autoencoder: autoencoder.Settings = field(default_factory=autoencoder.Settings)
    recurrent: recurrent.Settings = field(default_factory=recurrent.Settings)


def measure(settings: Settings, context: Context) -> Result:
    """Both experiments, seed by seed."""
    jobs = autoencoder.jobs(settings.autoencoder, context)
    return {
        "autoencoder": list(context.runner.run(jobs, "fig4 (a, b) autoencoder").values()),
        "recurrent": recurrent.measure(settings.recurrent, context),
    }


def draw(result: Result) -> dict[str, Canvas]:
    """The four panels."""
    canvas, axes = new_canvas(2, 2, width=4.2)
    autoencoder.draw((axes[0][0], axes[0][1]), result["autoencoder"])
    recurrent.draw((axes[1][0], axes[1][1]), result["recurrent"]["runs"])
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return {"fig4": canvas}


def verdicts(result: Result) -> list[Verdict]:
    """The claims of Sections 7.1.2 and 7.2."""
    return autoencoder.verdicts(result["autoencoder"]) + recurrent.verdicts(result["recurrent"]["runs"])


def rows(result: Result) -> list[Result]:
    """One row for each arm of each seed."""
    return [
        {
            "experiment": experiment,
            "seed": run["seed"],
            "arm": name,
            "first": arm["metric"][0],
            "last": arm["metric"][-1],
            "best": min(arm["metric"]),
            "seconds": arm["seconds"][-1],
            "epochs_or_steps": arm["epochs"][-1],
        }
        for experiment, runs in (("autoencoder", result["autoencoder"]), ("recurrent", result["recurrent"]["runs"]))
        for run in runs
        for name, arm in run["arms"].items()
    ]


CAPTION = (
    "(a, b) Deep autoencoder, logistic units, linear code, sparse initialization, trained on the cross-entropy; shown "
    "is the squared error summed over pixels, mean over the training images. The paper: SGD stalls at 1.0, SFN reaches "
    "0.57. (c, d) Character-level recurrent network, tanh units, orthogonal recurrent weights; bits per character on "
    "the training text. Every window is read from a zero hidden state and nothing is carried over, so neither "
    "truncation nor carrying changes the objective between two evaluations. After the plateau every arm spends the "
    "same processor time: SGD ends with its epoch, and a Newton step that ends later does not count. Krylov subspace, "
    "damping 1e0 to 1e-5 by best improvement. (d) compares the ends of SGD going on and of SFN."
)

FIGURE = Figure(
    name="fig4",
    title="Deep autoencoder and recurrent network: SGD to its plateau, then SFN",
    scales={
        "small": Settings(
            autoencoder.Settings(
                sizes=(100, 60, 30, 15, 8),
                image_size=10,
                cases=1000,
                batch_size=100,
                lr=0.03,
                patience=10,
                max_epochs=300,
                seconds=12.0,
                krylov_dim=32,
                inner_steps=3,
                curvature_cases=1000,
                part=1000,
                probe_cases=500,
                probe_dim=40,
                probe_every=(20, 5),
            ),
            recurrent.Settings(
                hidden=40,
                characters=10_000,
                length=25,
                batch_size=25,
                draws=12,
                search_epochs=4,
                patience=5,
                min_gain=0.01,
                max_epochs=60,
                seconds=10.0,
                krylov_dim=32,
                inner_steps=3,
                curvature_cases=400,
                part=400,
                probe_cases=400,
                probe_dim=60,
            ),
        ),
        "paper": Settings(),
    },
    seeds={"small": 5, "paper": 5},
    data=("mnist", "text"),
    measure=measure,
    draw=draw,
    verdicts=verdicts,
    rows=rows,
    caption=CAPTION,
)
