"""What every figure of the paper has here: settings for each scale, numbers, a picture, and verdicts on its claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sfn.experiments.runner import Result, Runner
from lightning_sfn.experiments.statistics import Interval, mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["Context", "Figure", "Sources", "Verdict", "by_seed", "judge", "new_canvas", "save_picture"]

REPRODUCED, IN_PART, NOT_REPRODUCED = "reproduced", "reproduced in part", "not reproduced"

COLOURS = {
    "sgd": "tab:blue",
    "damped_newton": "tab:green",
    "saddle_free": "tab:red",
    "newton": "tab:orange",
    "truncated_newton": "tab:purple",
}
"""One colour for each method, in every picture."""

NAMES = {
    "sgd": "SGD",
    "damped_newton": "damped Newton",
    "saddle_free": "SFN",
    "newton": "Newton",
    "truncated_newton": "truncated Newton",
}
"""What each method is called in pictures and tables."""


@dataclass(frozen=True)
class Sources:
    """Where the data come from.

    Attributes:
        mnist: A source of MNIST, as in `load_split`.
        cifar10: A source of CIFAR-10, or None to leave its panels out.
        text: A source of text, as in `read_text`.
    """

    mnist: str
    cifar10: str | None
    text: str

    @property
    def images(self) -> dict[str, str]:
        """The image sources that there are, by data set."""
        return {"mnist": self.mnist} | ({} if self.cifar10 is None else {"cifar10": self.cifar10})


@dataclass(frozen=True)
class Context:
    """What a figure's measurement is given beside its settings.

    Attributes:
        runner: Does the jobs and keeps their results.
        sources: Where the data come from.
        seeds: The seeds.
        device: Where to compute.
    """

    runner: Runner
    sources: Sources
    seeds: Sequence[int]
    device: str


@dataclass(frozen=True)
class Verdict:
    """A claim of the paper beside what was measured.

    Attributes:
        claim: The paper's statement.
        measured: What the numbers say.
        verdict: ``"reproduced"``, ``"reproduced in part"`` or ``"not reproduced"``.
    """

    claim: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class Figure:
    """One figure of the paper.

    Attributes:
        name: Its name on the command line.
        title: What it shows.
        scales: Settings (a dataclass instance) by scale.
        seeds: Number of seeds by scale.
        data: Which data it reads: names of `Sources`.
        measure: Does the jobs and collects the numbers.
        draw: Draws the figure's pictures, by file name without suffix.
        verdicts: The claims and what became of them.
        rows: The main numbers as a flat table.
        caption: One paragraph for the picture: sizes, methods, the paper's own values.
    """

    name: str
    title: str
    scales: dict[str, Any]
    seeds: dict[str, int]
    data: tuple[str, ...]
    measure: Callable[[Any, Context], Result]
    draw: Callable[[Result], dict[str, Canvas]]
    verdicts: Callable[[Result], list[Verdict]]
    rows: Callable[[Result], list[Result]]
    caption: str


def judge(claim: str, effects: Sequence[float], unit: str) -> Verdict:
    """Judges a claim by an effect that should be positive on every seed.

    Reproduced means that the 95% interval of the mean lies above zero; in part, that the mean does.

    Args:
        claim: The paper's statement.
        effects: The effect of each seed.
        unit: What the effect is, for the report.

    Returns:
        The verdict.
    """
    interval = mean_interval(effects)
    won = sum(effect > 0 for effect in effects)
    measured = f"{unit}: {interval}, positive for {won} of {len(effects)} seeds"
    return Verdict(claim, measured, verdict_of(interval))


def verdict_of(effect: Interval) -> str:
    """The verdict on an effect that should be positive."""
    if effect.low > 0:
        return REPRODUCED
    return IN_PART if effect.value > 0 else NOT_REPRODUCED


def by_seed(results: dict[str, Result], **wanted: Any) -> list[Result]:
    """The results whose entries are as wanted, in the order of their seeds."""
    found = [r for r in results.values() if all(r.get(key) == value for key, value in wanted.items())]
    return sorted(found, key=lambda result: result["seed"])


def new_canvas(rows: int, columns: int, *, width: float = 3.4, height: float = 2.7) -> tuple[Canvas, Any]:
    """A figure with panels, on a backend that needs no display.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        width: Inches of each panel.
        height: Inches of each panel.

    Returns:
        The figure, and its axes as an array of shape (rows, columns).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    canvas, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    return canvas, axes


def save_picture(canvas: Canvas, path: Path) -> None:
    """Saves a figure as PNG and PDF, and closes it."""
    from matplotlib import pyplot as plt

    canvas.savefig(path.with_suffix(".png"), dpi=90)
    canvas.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(canvas)
