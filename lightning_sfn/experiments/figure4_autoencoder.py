"""Figure 4 (a, b) and Section 7.1.2: a deep autoencoder by SGD until it stalls, and by SFN from there."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.classified import labelled_images
from lightning_sfn.experiments.figure import COLOURS, Context, Verdict, judge
from lightning_sfn.experiments.plateau import Budget, Curve, Problem, newton_arm, sgd_arm
from lightning_sfn.experiments.runner import Job, Result
from lightning_sfn.newton import SaddleFreeNewton

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Settings", "momentum_schedule", "run_seed"]

_MAX_MOMENTUM = 0.9  # where SGD's schedule ends


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        sizes: Layer widths from the pixels to the code.
        image_size: Side of the images in pixels.
        cases: Training images from the front of the data set; all if None.
        batch_size: Images in SGD's mini-batches.
        lr: SGD's learning rate.
        patience: Epochs without a relative gain of `min_gain` after which SGD has stalled.
        min_gain: That gain.
        max_epochs: Epochs of SGD at most.
        seconds: What SFN may spend, and SGD beside it.
        krylov_dim: Lanczos vectors.
        inner_steps: Steps in one subspace.
        curvature_cases: Images that Hessian products see.
        part: Images in one part of a full batch.
        probe_cases: Images of the spectra.
        probe_dim: Lanczos vectors of the spectra.
        probe_every: Epochs of SGD, and steps of SFN, between two spectra.
    """

    sizes: tuple[int, ...] = (784, 1000, 500, 250, 30)
    image_size: int = 28
    cases: int | None = None
    batch_size: int = 200
    lr: float = 0.01
    patience: int = 100
    min_gain: float = 0.01
    max_epochs: int = 2500
    seconds: float = 36_000.0
    krylov_dim: int = 500
    inner_steps: int = 5
    curvature_cases: int = 10_000
    part: int = 5000
    probe_cases: int = 10_000
    probe_dim: int = 100
    probe_every: tuple[int, int] = (50, 10)


def momentum_schedule(update: int, *, largest: float) -> float:
    """The momentum of an update: ``min(1 - 2^(-1 - log2(floor(t / 250) + 1)), largest)``.

    Returns:
        The momentum, Equation 5 of Sutskever et al. (2013).
    """
    return min(1 - 2 ** (-1 - math.log2(update // 250 + 1)), largest)


@lru_cache(maxsize=1)
def _images(source: str, image_size: int, cases: int | None) -> Tensor:
    pixels, _ = labelled_images("mnist", source, image_size=image_size, limit=cases)
    return pixels


def run_seed(*, source: str, seed: int, settings: Settings, device: str) -> Result:
    """SGD to its plateau, then SFN and SGD from that point, for the same time.

    Args:
        source: Where MNIST comes from.
        seed: Seed of the start and of the order of the images.
        settings: Sizes.
        device: Where to compute.

    Returns:
        The curves of the three arms; the metric is the squared error summed over pixels, mean over images.
    """
    images = _images(source, settings.image_size, settings.cases).to(device)
    torch.manual_seed(seed)
    model = Autoencoder(settings.sizes, "sigmoid", "cross_entropy", initialization="sparse").to(device)
    problem = _problem(model, images, settings)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(images), generator=generator)[: settings.probe_cases]
    updates = math.ceil(len(images) / settings.batch_size)

    def arm() -> Curve:
        return Curve(problem, rows, settings.probe_dim)

    def sgd(curve: Curve, budget: Budget, first_epoch: int, patience: int) -> None:
        def schedule(update: int) -> tuple[float, float]:
            return settings.lr, momentum_schedule(first_epoch * updates + update, largest=_MAX_MOMENTUM)

        sgd_arm(
            problem,
            curve,
            budget=budget,
            batch_size=settings.batch_size,
            schedule=schedule,
            generator=generator,
            patience=patience,
            min_gain=settings.min_gain,
            probe_every=settings.probe_every[0],
        )

    start = arm()
    sgd(start, Budget(epochs=settings.max_epochs), 0, settings.patience)
    plateau = copy.deepcopy(model.state_dict())
    onward = arm()
    sgd(onward, Budget(seconds=settings.seconds), round(start.epochs[-1]), 0)
    model.load_state_dict(plateau)
    newton = arm()
    optimizer = SaddleFreeNewton.as_in_paper(
        model.parameters(), krylov_dim=settings.krylov_dim, inner_steps=settings.inner_steps
    )
    accepted = newton_arm(
        problem,
        newton,
        optimizer,
        budget=Budget(seconds=settings.seconds),
        curvature_cases=settings.curvature_cases,
        generator=generator,
        probe_every=settings.probe_every[1],
    )
    arms = {"start": start.result(), "sgd": onward.result(), "saddle_free": newton.result()}
    return {"seed": seed, "arms": arms, "accepted": sum(accepted), "steps": len(accepted)}


def _problem(model: Autoencoder, images: Tensor, settings: Settings) -> Problem:
    def loss(cases: Tensor) -> Tensor:
        return model.reconstruction_loss(cases.float() / 255 if cases.dtype == torch.uint8 else cases)

    @torch.no_grad()
    def metric() -> float:
        total = 0.0
        for chunk in torch.split(images, settings.part):
            cases = chunk.float() / 255 if chunk.dtype == torch.uint8 else chunk
            total += float((model(cases) - cases).square().sum(dtype=torch.float64))
        return total / len(images)

    return Problem(model, images, loss, metric, settings.part)


def jobs(settings: Settings, context: Context) -> list[Job]:
    """One job for each seed."""
    shared: dict[str, Any] = {"source": context.sources.mnist, "settings": settings, "device": context.device}
    return [Job(f"autoencoder-{seed}", run_seed, shared | {"seed": seed}) for seed in context.seeds]


def draw(axes: tuple[Axes, Axes], runs: list[Result]) -> None:
    """Learning curves, and the most negative eigenvalue and the gradient norm along them.

    Args:
        axes: Panels (a) and (b).
        runs: The seeds' results; (b) shows the first one.
    """
    left, right = axes
    for number, run in enumerate(runs):
        offset = run["arms"]["start"]["seconds"][-1]
        for name, colour, label in (
            ("start", COLOURS["sgd"], "SGD"),
            ("sgd", "tab:cyan", "SGD continued"),
            ("saddle_free", COLOURS["saddle_free"], "SGD + SFN"),
        ):
            arm = run["arms"][name]
            x = [(0 if name == "start" else offset) + s for s in arm["seconds"]]
            left.plot(x, arm["metric"], color=colour, linewidth=1, alpha=0.7, label=label if number == 0 else None)
    left.set(title="(a) deep autoencoder", xlabel="seconds", ylabel="squared error per image", yscale="log")
    left.legend(fontsize=8)
    _draw_spectra(right, runs[0])


def _draw_spectra(axis: Axes, run: Result) -> None:
    offset = run["arms"]["start"]["epochs"][-1]
    for name, shift in (("start", 0), ("saddle_free", offset)):
        spectra = run["arms"][name]["spectra"]
        x = [shift + s["epoch"] for s in spectra]
        colour = COLOURS["saddle_free" if name == "saddle_free" else "sgd"]
        axis.plot(x, [_depth(s) for s in spectra], color=colour)
        axis.plot(x, [s["gradient_norm"] for s in spectra], color=colour, linestyle="--")
    axis.axvline(offset, color="0.6", linestyle=":")
    axis.plot([], [], color="0.2", label="|most negative eigenvalue| (or its error)")
    axis.plot([], [], color="0.2", linestyle="--", label="gradient norm")
    axis.set(title="(b) deep autoencoder, first seed", xlabel="epochs of SGD, then steps of SFN", yscale="log")
    axis.legend(fontsize=8)


def verdicts(runs: list[Result]) -> list[Verdict]:
    """The claims of Section 7.1.2."""
    plateau = [run["arms"]["start"]["metric"][-1] for run in runs]
    sgd = [min(run["arms"]["sgd"]["metric"]) for run in runs]
    newton = [run["arms"]["saddle_free"]["metric"][-1] for run in runs]
    ends = [(run["arms"]["start"]["spectra"], run["arms"]["saddle_free"]["spectra"]) for run in runs]
    return [
        judge(
            "autoencoder: SGD followed by SFN drops below the plateau of SGD (paper: from 1.0 to 0.57)",
            [1 - after / before for before, after in zip(plateau, newton, strict=True)],
            "relative decrease of the squared error",
        ),
        judge(
            "autoencoder: SFN goes lower than SGD going on for the same time",
            [1 - ours / theirs for ours, theirs in zip(newton, sgd, strict=True)],
            "relative difference of the squared errors",
        ),
        judge(
            "autoencoder: the most negative eigenvalue moves towards zero as SGD's error falls",
            [math.log10(max(map(_depth, before)) / _depth(before[-1])) for before, _ in ends],
            "log10 of its size, deepest over last",
        ),
        judge(
            "autoencoder: SFN accelerates this shift",
            [math.log10(_depth(after[0]) / _depth(after[-1])) for _, after in ends],
            "log10 of its size, before SFN over after",
        ),
    ]


def _depth(spectrum: Result) -> float:
    """Size of the most negative eigenvalue; below the error bound of the lowest Ritz value nothing is known of it."""
    return max(-float(spectrum["lambda_min"]), float(spectrum["residuals"][0]))
