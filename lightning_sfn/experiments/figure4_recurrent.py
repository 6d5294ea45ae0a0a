"""Figure 4 (c, d) and Section 7.2: a character-level recurrent network by SGD until it stalls, then by SFN."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sfn.experiments.figure import COLOURS, NAMES, Context, Verdict, judge
from lightning_sfn.experiments.plateau import Budget, Curve, Problem, newton_arm, sgd_arm
from lightning_sfn.experiments.recurrent import CharacterRNN
from lightning_sfn.experiments.runner import Job, Result
from lightning_sfn.experiments.search import draw_number
from lightning_sfn.experiments.text import Vocabulary, Windows, read_text
from lightning_sfn.newton import SaddleFreeNewton

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Settings", "run_seed", "search_run"]

NEWTON_ARMS = ("saddle_free", "truncated_newton")
SOLUTIONS = ("sgd", "saddle_free")
"""The arms whose ends panel (d) and its claim compare: SGD after going on for the same time, and SFN."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        hidden: Hidden units.
        characters: Characters from the front of the training text; all if None.
        length: Characters predicted in each window.
        batch_size: Windows in SGD's mini-batches.
        draws: Draws of SGD's random search.
        search_epochs: Epochs of each draw.
        patience: Epochs without a relative gain of `min_gain` after which SGD has stalled.
        min_gain: That gain.
        max_epochs: Epochs of SGD at most.
        seconds: What each arm after the plateau may spend.
        krylov_dim: Lanczos vectors.
        inner_steps: Steps in one subspace.
        max_step_norm: Bound on the norm of a step (Appendix F.3).
        curvature_cases: Windows that Hessian products see.
        part: Windows in one part of a full batch.
        probe_cases: Windows of the spectra.
        probe_dim: Lanczos vectors of the spectra.
    """

    hidden: int = 120
    characters: int | None = None
    length: int = 50
    batch_size: int = 100
    draws: int = 64
    search_epochs: int = 10
    patience: int = 10
    min_gain: float = 0.001
    max_epochs: int = 500
    seconds: float = 36_000.0
    krylov_dim: int = 500
    inner_steps: int = 5
    max_step_norm: float = 10.0
    curvature_cases: int = 5000
    part: int = 2000
    probe_cases: int = 5000
    probe_dim: int = 500


@lru_cache(maxsize=1)
def _windows(source: str, characters: int | None, length: int) -> tuple[Tensor, int]:
    """All training windows, int64 of shape (count, length + 1), and the size of the vocabulary."""
    text = read_text(source, "train")[:characters]
    vocabulary = Vocabulary(text)
    windows = Windows(vocabulary.encode(text, "training"), length)
    return windows.__getitems__(range(len(windows))), len(vocabulary)


def _problem(source: str, seed: int, settings: Settings, device: str) -> Problem:
    windows, vocabulary_size = _windows(source, settings.characters, settings.length)
    torch.manual_seed(seed)
    model = CharacterRNN(vocabulary_size, settings.hidden).to(device)
    windows = windows.to(device)

    @torch.no_grad()
    def bits() -> float:
        parts = torch.split(windows, settings.part)
        return sum(float(model.loss(part)) * len(part) for part in parts) / len(windows) / math.log(2)

    return Problem(model, windows, model.loss, bits, settings.part)


def search_run(
    *, source: str, seed: int, settings: Settings, device: str, lr: float, momentum: float, max_grad_norm: float
) -> Result:
    """One draw of SGD's random search.

    Args:
        source: Where the text comes from.
        seed: Seed of the start and of the order of the windows.
        settings: Sizes.
        device: Where to compute.
        lr: Learning rate.
        momentum: Momentum coefficient.
        max_grad_norm: Clipping threshold.

    Returns:
        The settings and the bits per character reached, 1e9 where it diverged.
    """
    problem = _problem(source, seed, settings, device)
    curve = Curve(problem, torch.empty(0, dtype=torch.int64), 0)
    _sgd(problem, curve, Budget(epochs=settings.search_epochs), settings, (lr, momentum, max_grad_norm), seed, 0)
    last = curve.metric[-1] if math.isfinite(curve.metric[-1]) else 1e9
    return {"lr": lr, "momentum": momentum, "max_grad_norm": max_grad_norm, "bits": last}


def _sgd(
    problem: Problem,
    curve: Curve,
    budget: Budget,
    settings: Settings,
    chosen: tuple[float, float, float],
    seed: int,
    patience: int,
) -> None:
    lr, momentum, max_grad_norm = chosen
    sgd_arm(
        problem,
        curve,
        budget=budget,
        batch_size=settings.batch_size,
        schedule=lambda update: (lr, momentum),
        generator=torch.Generator().manual_seed(seed),
        max_grad_norm=max_grad_norm,
        patience=patience,
        min_gain=settings.min_gain,
        probe_every=10**9,
    )


def run_seed(
    *, source: str, seed: int, settings: Settings, device: str, lr: float, momentum: float, max_grad_norm: float
) -> Result:
    """SGD to its plateau, then SGD, SFN and truncated Newton from that point, for the same time.

    Args:
        source: Where the text comes from.
        seed: Seed of the start and of the order of the windows.
        settings: Sizes.
        device: Where to compute.
        lr: SGD's learning rate.
        momentum: SGD's momentum coefficient.
        max_grad_norm: Clipping threshold of the gradient, for all arms.

    Returns:
        The curves of the arms in bits per character on the training text, and the spectra at their ends.
    """
    problem = _problem(source, seed, settings, device)
    rows = torch.randperm(len(problem.cases), generator=torch.Generator().manual_seed(seed))[: settings.probe_cases]
    chosen = (lr, momentum, max_grad_norm)
    arms, spectra, accepted = {}, {}, {}

    def keep(name: str, curve: Curve) -> None:
        arms[name] = curve.result()
        spectra[name] = problem.spectrum(rows, settings.probe_dim).to_dict()

    start = Curve(problem, rows, 0)
    _sgd(problem, start, Budget(epochs=settings.max_epochs), settings, chosen, seed, settings.patience)
    keep("start", start)
    plateau = copy.deepcopy(problem.model.state_dict())
    onward = Curve(problem, rows, 0)
    _sgd(problem, onward, Budget(seconds=settings.seconds), settings, chosen, seed + 1, 0)
    keep("sgd", onward)
    for rule in NEWTON_ARMS:
        problem.model.load_state_dict(plateau)
        curve = Curve(problem, rows, 0)
        optimizer = SaddleFreeNewton.as_in_paper(
            problem.model.parameters(),
            krylov_dim=settings.krylov_dim,
            inner_steps=settings.inner_steps,
            trust_region=rule,
            max_grad_norm=max_grad_norm,
            max_step_norm=settings.max_step_norm,
        )
        taken = newton_arm(
            problem,
            curve,
            optimizer,
            budget=Budget(seconds=settings.seconds),
            curvature_cases=settings.curvature_cases,
            generator=torch.Generator().manual_seed(seed),
        )
        keep(rule, curve)
        accepted[rule] = [sum(taken), len(taken)]
    return {"seed": seed, "arms": arms, "spectra": spectra, "accepted": accepted}


def measure(settings: Settings, context: Context) -> Result:
    """The random search, and every seed with its winner."""
    shared: dict[str, Any] = {"source": context.sources.text, "settings": settings, "device": context.device}
    searches = []
    for draw_index in range(settings.draws):
        generator = torch.Generator().manual_seed(draw_index)
        drawn = {
            "lr": draw_number(generator, 1e-2, 3.0, logarithmic=True),
            "momentum": draw_number(generator, 0.0, 0.99),
            "max_grad_norm": draw_number(generator, 0.1, 10.0, logarithmic=True),
        }
        searches.append(Job(f"recurrent-search-{draw_index}", search_run, shared | drawn | {"seed": 1000}))
    tried = context.runner.run(searches, "fig4 (c) random search").values()
    best = {key: value for key, value in min(tried, key=lambda r: r["bits"]).items() if key != "bits"}
    jobs = [Job(f"recurrent-{seed}", run_seed, shared | best | {"seed": seed}) for seed in context.seeds]
    return {"search": best, "runs": list(context.runner.run(jobs, "fig4 (c, d) recurrent network").values())}


def draw(axes: tuple[Axes, Axes], runs: list[Result]) -> None:
    """Learning curves, and the Krylov eigenvalues of the SGD and of the SFN solution."""
    left, right = axes
    labels = {"start": "SGD", "sgd": "SGD continued", "saddle_free": "SGD + SFN", "truncated_newton": "SGD + truncated"}
    colours = COLOURS | {"start": COLOURS["sgd"], "sgd": "tab:cyan"}
    for number, run in enumerate(runs):
        offset = run["arms"]["start"]["seconds"][-1]
        for name, arm in run["arms"].items():
            x = [(0 if name == "start" else offset) + s for s in arm["seconds"]]
            label = labels[name] if number == 0 else None
            left.plot(x, arm["metric"], color=colours[name], linewidth=1, alpha=0.7, label=label)
    left.set(title="(c) recurrent network", xlabel="seconds", ylabel="bits per character")
    left.legend(fontsize=8)
    for name in SOLUTIONS:
        values = torch.tensor([v for run in runs for v in run["spectra"][name]["eigenvalues"]], dtype=torch.float64)
        shown = values.sign() * torch.log10(1 + values.abs() / 1e-4)
        right.hist(shown.tolist(), bins=60, histtype="step", color=COLOURS[name], label=labels[name])
    right.axvline(0, color="0.3", linewidth=0.8)
    right.set_yscale("log")
    right.set(title="(d) Krylov eigenvalues, all seeds", ylabel="count")
    right.set_xlabel(r"sign($\lambda$) log$_{10}$(1 + |$\lambda$| / 1e-4)")
    right.legend(fontsize=8)


def verdicts(runs: list[Result]) -> list[Verdict]:
    """The claims of Section 7.2."""
    plateau = [run["arms"]["start"]["metric"][-1] for run in runs]
    best = {name: [min(run["arms"][name]["metric"]) for run in runs] for name in ("sgd", *NEWTON_ARMS)}
    negative = {n: [r["spectra"][n]["negative_fraction"] for r in runs] for n in SOLUTIONS}
    return [
        judge(
            "recurrent network: SGD followed by SFN drops below the plateau of SGD",
            [before - after for before, after in zip(plateau, best["saddle_free"], strict=True)],
            "decrease in bits per character",
        ),
        judge(
            "recurrent network: SFN goes lower than SGD going on for the same time",
            [theirs - ours for theirs, ours in zip(best["sgd"], best["saddle_free"], strict=True)],
            "difference in bits per character",
        ),
        judge(
            f"recurrent network: {NAMES['truncated_newton']} helps less than SFN",
            [theirs - ours for theirs, ours in zip(best["truncated_newton"], best["saddle_free"], strict=True)],
            "difference in bits per character",
        ),
        judge(
            "recurrent network: the SFN solution has fewer negative eigenvalues than the SGD solution",
            [theirs - ours for theirs, ours in zip(*negative.values(), strict=True)],
            "difference of the negative shares of the Ritz values, SGD going on for the same time",
        ),
    ]
