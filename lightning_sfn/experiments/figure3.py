"""Figure 3 and Section 7.1.1: single-layer perceptrons of three sizes by SGD, damped Newton and SFN, both exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_sfn.experiments.figure import (
    COLOURS,
    IN_PART,
    NAMES,
    NOT_REPRODUCED,
    REPRODUCED,
    Context,
    Figure,
    Verdict,
    by_seed,
    judge,
    new_canvas,
)
from lightning_sfn.experiments.figure3_runs import DIVERGED, Settings, newton_run, sgd_run
from lightning_sfn.experiments.runner import Job, Result
from lightning_sfn.experiments.search import draw_number
from lightning_sfn.experiments.statistics import mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["FIGURE"]

METHODS = ("sgd", "damped_newton", "saddle_free")


def measure(settings: Settings, context: Context) -> Result:
    """Searches SGD's settings for each network, then does every run."""
    best = _search(settings, context)
    jobs = []
    for dataset, source in context.sources.images.items():
        for hidden in settings.hidden:
            shared = {
                "dataset": dataset,
                "source": source,
                "hidden": hidden,
                "settings": settings,
                "device": context.device,
            }
            for seed in context.seeds:
                arguments = shared | {"seed": seed}
                chosen = best[f"{dataset}-{hidden}"] | {"probes": settings.probes}
                jobs.append(Job(f"sgd-{dataset}-{hidden}-{seed}", sgd_run, arguments | chosen))
                for method in METHODS[1:]:
                    jobs.append(Job(f"{method}-{dataset}-{hidden}-{seed}", newton_run, arguments | {"method": method}))
    runs = context.runner.run(jobs, "fig3 runs")
    return {"search": best, "runs": runs}


def _search(settings: Settings, context: Context) -> dict[str, Result]:
    """The best draw of SGD's settings for each data set and size: smallest error of a run, then smallest loss.

    A draw that diverged is out, whatever it had reached before, unless all did.
    """
    jobs = []
    for dataset, source in context.sources.images.items():
        for hidden in settings.hidden:
            for draw in range(settings.draws):
                generator = torch.Generator().manual_seed(draw)
                arguments = {
                    "dataset": dataset,
                    "source": source,
                    "hidden": hidden,
                    "seed": 1000 + draw,
                    "settings": settings,
                    "device": context.device,
                    "lr": draw_number(generator, 1e-3, 1.0, logarithmic=True),
                    "momentum": draw_number(generator, 0.0, 0.99),
                    "batch_size": round(draw_number(generator, 10, 200, logarithmic=True)),
                    "probes": 0,
                }
                jobs.append(Job(f"search-{dataset}-{hidden}-{draw}", sgd_run, arguments))
    results = context.runner.run(jobs, "fig3 random search")
    best: dict[str, Result] = {}
    for dataset in context.sources.images:
        for hidden in settings.hidden:
            tried = [r for r in results.values() if r["dataset"] == dataset and r["hidden"] == hidden]
            winner = best_draw(tried)
            best[f"{dataset}-{hidden}"] = {name: winner[name] for name in ("lr", "momentum", "batch_size")}
    return best


def best_draw(tried: Sequence[Result]) -> Result:
    """The run of the smallest error, then of the smallest loss, among those that did not diverge (if there are any)."""
    sound = [run for run in tried if run["losses"][-1] < DIVERGED]
    return min(sound or tried, key=lambda run: (min(run["errors"]), min(run["losses"])))


def datasets_of(result: Result) -> list[str]:
    """The data sets that were measured, in order."""
    return list(dict.fromkeys(run["dataset"] for run in result["runs"].values()))


def sizes_of(result: Result) -> list[int]:
    """The hidden layers that were measured, in order."""
    return sorted({run["hidden"] for run in result["runs"].values()})


def draw(result: Result) -> dict[str, Canvas]:
    """Smallest error against size; error against epochs; most negative eigenvalue against epochs."""
    datasets, sizes = datasets_of(result), sizes_of(result)
    canvas, axes = new_canvas(len(datasets), 3)
    for row, dataset in enumerate(datasets):
        for method in METHODS:
            _draw_method(axes[row], result, dataset, sizes, method)
        letters = "abc" if row == 0 else "def"
        shown = {"mnist": "MNIST", "cifar10": "CIFAR-10"}[dataset]
        for axis, letter in zip(axes[row], letters, strict=True):
            axis.set_title(f"({letter}) {shown}", fontsize=9)
            axis.grid(alpha=0.3)
        axes[row][0].set(xlabel="hidden units", ylabel="smallest training error (%)", xticks=sizes)
        axes[row][1].set(xlabel=f"epochs ({sizes[-1]} units)", ylabel="training error (%)", xscale="symlog")
        axes[row][2].set(xlabel=f"epochs ({sizes[-1]} units)", ylabel="|most negative eigenvalue|", xscale="symlog")
        axes[row][2].set_yscale("log")
    axes[0][0].legend(fontsize=8)
    return {"fig3": canvas}


def _draw_method(axes: Any, result: Result, dataset: str, sizes: Sequence[int], method: str) -> None:
    style = {"color": COLOURS[method], "label": NAMES[method]}
    means = [
        mean_interval(
            [100 * min(r["errors"]) for r in by_seed(result["runs"], dataset=dataset, hidden=h, method=method)]
        )
        for h in sizes
    ]
    spread = [
        [m.value - max(m.low, 0.0) if math.isfinite(m.low) else 0.0 for m in means],
        [m.high - m.value if math.isfinite(m.high) else 0.0 for m in means],
    ]
    axes[0].errorbar(sizes, [m.value for m in means], yerr=spread, marker="o", capsize=3, **style)
    for run in by_seed(result["runs"], dataset=dataset, hidden=sizes[-1], method=method):
        axes[1].plot([100 * e for e in run["errors"]], alpha=0.6, linewidth=1, **style)
        axes[2].plot(run["probe_epochs"], [-min(v, -1e-12) for v in run["lambda_min"]], alpha=0.6, linewidth=1, **style)


def verdicts(result: Result) -> list[Verdict]:
    """The claims of Section 7.1.1."""
    sizes = sizes_of(result)
    found = []
    for dataset in datasets_of(result):
        for hidden in [h for h in sizes if h != sizes[0]]:
            for other in ("sgd", "damped_newton"):
                found.append(_lower_error(result, dataset, hidden, other))
        found.append(_comparable(result, dataset, sizes[0]))
        found.append(_shift(result, dataset, sizes[-1]))
        found.append(_more_shift(result, dataset, sizes[-1]))
    return found


def _runs(result: Result, dataset: str, hidden: int, method: str) -> list[Result]:
    return by_seed(result["runs"], dataset=dataset, hidden=hidden, method=method)


def _lower_error(result: Result, dataset: str, hidden: int, other: str) -> Verdict:
    """By the smallest error of whole runs; in part at best against SGD, whose epochs take far less time than SFN's."""
    ours, theirs = _runs(result, dataset, hidden, "saddle_free"), _runs(result, dataset, hidden, other)
    verdict = judge(
        f"{dataset}, {hidden} units: SFN reaches a lower training error than {NAMES[other]}",
        [100 * (min(b["errors"]) - min(a["errors"])) for a, b in zip(ours, theirs, strict=True)],
        "difference of the smallest errors in percent points",
    )
    epochs, more = len(ours[0]["errors"]), len(theirs[0]["errors"])
    if more <= epochs:
        return verdict
    early = mean_interval(
        [100 * (min(b["errors"][:epochs]) - min(a["errors"])) for a, b in zip(ours, theirs, strict=True)]
    )
    measured = (
        f"{verdict.measured}, with {epochs - 1} epochs of SFN and {more - 1} of {NAMES[other]}; at equal epochs {early}"
    )
    reached = IN_PART if early.low > 0 else NOT_REPRODUCED
    return Verdict(verdict.claim, measured, reached)


def _comparable(result: Result, dataset: str, hidden: int) -> Verdict:
    means = {m: mean_interval([100 * min(r["errors"]) for r in _runs(result, dataset, hidden, m)]) for m in METHODS}
    text = ", ".join(f"{NAMES[m]} {i}" for m, i in means.items())
    overlap = max(i.low for i in means.values()) <= min(i.high for i in means.values())
    claim = f"{dataset}, {hidden} units: with the smallest network all perform comparably"
    return Verdict(claim, f"smallest errors in percent: {text}", REPRODUCED if overlap else NOT_REPRODUCED)


def _deepest_and_last(run: Result) -> tuple[float, float]:
    return min(run["lambda_min"]), run["lambda_min"][-1]


def _probed(result: Result, dataset: str, hidden: int) -> list[dict[str, Result]]:
    """The runs of each seed by method, without seeds of which a run has no spectrum: it diverged before the first."""
    seeds = zip(*(_runs(result, dataset, hidden, m) for m in METHODS), strict=True)
    by_method = [dict(zip(METHODS, runs, strict=True)) for runs in seeds]
    return [runs for runs in by_method if all(run["lambda_min"] for run in runs.values())]


def _judge_probed(claim: str, effects: Sequence[float], unit: str, seeds: int) -> Verdict:
    left_out = seeds - len(effects)
    if not effects:
        return Verdict(claim, f"no seed of {seeds} has spectra of all methods", NOT_REPRODUCED)
    verdict = judge(claim, effects, unit)
    if left_out == 0:
        return verdict
    measured = f"{verdict.measured}; {left_out} of {seeds} left out, where a run diverged before its first spectrum"
    return Verdict(claim, measured, verdict.verdict)


def _shift(result: Result, dataset: str, hidden: int) -> Verdict:
    """The most negative eigenvalue ends nearer to zero than it was at its deepest, for each method."""
    effects = [
        min(1 - last / deepest if deepest < 0 else 0.0 for deepest, last in map(_deepest_and_last, runs.values()))
        for runs in _probed(result, dataset, hidden)
    ]
    return _judge_probed(
        f"{dataset}, {hidden} units: the most negative eigenvalue moves towards zero as the error falls",
        effects,
        "share of the deepest eigenvalue that is gone at the end, the worst of the three methods",
        len(_runs(result, dataset, hidden, "sgd")),
    )


def _more_shift(result: Result, dataset: str, hidden: int) -> Verdict:
    effects = []
    for runs in _probed(result, dataset, hidden):
        sgd, damped, sfn = (max(abs(runs[method]["lambda_min"][-1]), 1e-12) for method in METHODS)
        effects.append(math.log10(min(sgd, damped) / sfn))
    return _judge_probed(
        f"{dataset}, {hidden} units: it moves further for SFN",
        effects,
        "log10 of its size at the end, the better of SGD and damped Newton over SFN",
        len(_runs(result, dataset, hidden, "sgd")),
    )


def rows(result: Result) -> list[Result]:
    """One row for each run."""
    return [
        {
            "dataset": run["dataset"],
            "hidden": run["hidden"],
            "method": run["method"],
            "seed": run["seed"],
            "smallest_error": min(run["errors"]),
            "smallest_loss": min(run["losses"]),
            "epochs": len(run["errors"]) - 1,
            "lambda_min_first": run["lambda_min"][0] if run["lambda_min"] else None,
            "lambda_min_last": run["lambda_min"][-1] if run["lambda_min"] else None,
        }
        for run in result["runs"].values()
    ]


CAPTION = (
    "Single-layer perceptrons on images shrunk by area averaging (CIFAR-10 as luminance). SGD: mini-batches with "
    "momentum, settings by random search. Damped Newton and SFN: exact, dense Hessian, one full-batch step an epoch, "
    "damping from 1e0 to 1e-5 by best improvement. Errors are the share of wrong classes on the training set. The "
    "paper prints no numbers for this figure."
)

FIGURE = Figure(
    name="fig3",
    title="Existence of saddle points: error and most negative eigenvalue by size and method",
    scales={
        "small": Settings(image_size=5, cases=500, newton_epochs=15, sgd_epochs=100, draws=10, part=500, probes=8),
        "paper": Settings(),
    },
    seeds={"small": 5, "paper": 5},
    data=("mnist", "cifar10"),
    measure=measure,
    draw=draw,
    verdicts=verdicts,
    rows=rows,
    caption=CAPTION,
)
