"""Figure 1 and Appendix C: how error and index of critical points go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sfn.experiments.critical_points import CriticalPoint, find_critical_point
from lightning_sfn.experiments.figure import (
    IN_PART,
    NOT_REPRODUCED,
    REPRODUCED,
    Context,
    Figure,
    Verdict,
    new_canvas,
    verdict_of,
)
from lightning_sfn.experiments.figure3_runs import CLASSES, load
from lightning_sfn.experiments.perceptron import Perceptron
from lightning_sfn.experiments.runner import Job, Result
from lightning_sfn.experiments.search import draw_number
from lightning_sfn.experiments.statistics import rank_correlation
from lightning_sfn.newton import FlatParameters, SaddleFreeNewton

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["FIGURE", "Settings", "points_from_sgd", "points_from_trajectory", "points_from_uniform_weights"]

NOISE = (1e-1, 1e-2, 1e-3, 1e-4)
"""Amplitudes of the uniform noise that is added to points on a trajectory (Appendix C)."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        image_size: Side of the images in pixels.
        cases: Training images from the front of the data set; all if None.
        hidden: Hidden units of the MNIST network, and of each hidden layer of the CIFAR-10 networks.
        layers: Layers of the CIFAR-10 networks.
        epochs: Longest piece of an SFN trajectory, in full-batch steps.
        trajectory_points: Searches from points on the trajectory of a seed.
        uniform_points: Searches from uniformly drawn weights with the same seed.
        sgd_epochs: Shortest and longest training of a CIFAR-10 network.
        networks: CIFAR-10 networks of a seed.
        bound: Norm of the gradient below which a point counts as critical.
        max_steps: Hessians that a search may spend.
    """

    image_size: int = 10
    cases: int | None = None
    hidden: int = 5
    layers: int = 3
    epochs: int = 20
    trajectory_points: int = 5
    uniform_points: int = 5
    sgd_epochs: tuple[int, int] = (10, 300)
    networks: int = 5
    bound: float = 1e-6
    max_steps: int = 1000


def points_from_trajectory(*, source: str, seed: int, settings: Settings, device: str) -> Result:
    """Critical points near points on one trajectory of SFN, with uniform noise added.

    Args:
        source: Where MNIST comes from.
        seed: Seed of the start and of everything drawn.
        settings: Sizes.
        device: Where to compute.

    Returns:
        The ends of the searches.
    """
    model, closure, parameters, error = _perceptron("mnist", source, seed, settings, device)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(settings.epochs + 1, (settings.trajectory_points,), generator=generator).tolist()
    amplitudes = [NOISE[int(i)] for i in torch.randint(len(NOISE), (len(wanted),), generator=generator)]
    optimizer = SaddleFreeNewton.as_in_paper(
        model.parameters(),
        krylov_dim="full",
        inner_steps=1,
    )
    snapshots = [parameters.read()]
    for _ in range(max(wanted, default=0)):
        optimizer.step(closure)
        snapshots.append(parameters.read())
    points = []
    for epoch, amplitude in zip(wanted, amplitudes, strict=True):
        noise = 2 * torch.rand(parameters.size, generator=generator, dtype=torch.float64) - 1
        parameters.write(snapshots[epoch] + amplitude * noise.to(device))
        point = find_critical_point(closure, parameters, bound=settings.bound, max_steps=settings.max_steps)
        points.append(_summary(point, error) | {"start": "trajectory", "epoch": epoch, "noise": amplitude})
    return {"dataset": "mnist", "seed": seed, "points": points}


def points_from_uniform_weights(*, source: str, seed: int, settings: Settings, device: str) -> Result:
    """Critical points near weights drawn uniformly from the cube [-1, 1]^n.

    Returns:
        The ends of the searches.
    """
    _, closure, parameters, error = _perceptron("mnist", source, seed, settings, device)
    generator = torch.Generator().manual_seed(10_000 + seed)
    points = []
    for _ in range(settings.uniform_points):
        weights = 2 * torch.rand(parameters.size, generator=generator, dtype=torch.float64) - 1
        parameters.write(weights.to(device))
        point = find_critical_point(closure, parameters, bound=settings.bound, max_steps=settings.max_steps)
        points.append(_summary(point, error) | {"start": "uniform"})
    return {"dataset": "mnist", "seed": seed, "points": points}


def points_from_sgd(*, source: str, seed: int, settings: Settings, device: str) -> Result:
    """Critical points near deep networks that SGD trained on CIFAR-10 for a random number of epochs.

    Returns:
        The ends of the searches.
    """
    images, labels = (tensor.to(device) for tensor in load("cifar10", source, settings.image_size, settings.cases))
    generator = torch.Generator().manual_seed(20_000 + seed)
    points = []
    for network in range(settings.networks):
        model, closure, parameters, error = _perceptron("cifar10", source, 100 * seed + network, settings, device)
        epochs = round(draw_number(generator, *settings.sgd_epochs))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(images), generator=generator), 50):
                optimizer.zero_grad()
                model.loss(images[rows], labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        optimizer.zero_grad()
        point = find_critical_point(closure, parameters, bound=settings.bound, max_steps=settings.max_steps)
        points.append(_summary(point, error) | {"start": "sgd", "epoch": epochs})
    return {"dataset": "cifar10", "seed": seed, "points": points}


def _perceptron(
    dataset: str, source: str, seed: int, settings: Settings, device: str
) -> tuple[Perceptron, Callable[[], Tensor], FlatParameters, Callable[[], float]]:
    images, labels = (tensor.to(device) for tensor in load(dataset, source, settings.image_size, settings.cases))
    torch.manual_seed(seed)
    hidden = [settings.hidden] * (1 if dataset == "mnist" else settings.layers - 1)
    model = Perceptron((images.shape[1], *hidden, CLASSES)).double().to(device)
    return (
        model,
        lambda: model.loss(images, labels),
        FlatParameters(model.parameters()),
        lambda: model.error(images, labels),
    )


def _summary(point: CriticalPoint, error: Callable[[], float]) -> Result:
    return {
        "found": point.found,
        "loss": point.loss,
        "error": error(),
        "gradient_norm": point.gradient_norm,
        "index": point.index,
        "lambda_min": float(point.eigenvalues[0]),
        "steps": point.steps,
        "eigenvalues": [float(f"{value:.4g}") for value in point.eigenvalues],
    }


def measure(settings: Settings, context: Context) -> Result:
    """Every search of every seed; the full spectra are kept for three points of each data set."""
    jobs = []
    for seed in context.seeds:
        shared = {"seed": seed, "settings": settings, "device": context.device}
        mnist = shared | {"source": context.sources.mnist}
        jobs.append(Job(f"trajectory-{seed}", points_from_trajectory, mnist))
        jobs.append(Job(f"uniform-{seed}", points_from_uniform_weights, mnist))
        if context.sources.cifar10 is not None:
            jobs.append(Job(f"sgd-{seed}", points_from_sgd, shared | {"source": context.sources.cifar10}))
    runs = context.runner.run(jobs, "fig1 critical points").values()
    points: dict[str, list[Result]] = {}
    for run in runs:
        points.setdefault(run["dataset"], []).extend(run["points"])
    spectra = {dataset: three_levels(found) for dataset, found in points.items()}
    slim = {d: [{k: v for k, v in p.items() if k != "eigenvalues"} for p in found] for d, found in points.items()}
    return {"bound": settings.bound, "points": slim, "spectra": spectra}


def three_levels(points: Sequence[Result]) -> list[Result]:
    """The critical points of lowest, middle and highest error, in this order (fewer if there are fewer)."""
    found = sorted((p for p in points if p["found"]), key=lambda p: p["loss"])
    return [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})] if found else []


def draw(result: Result) -> dict[str, Canvas]:
    """Error against index, and the eigenvalue distribution at three points, for each data set."""
    canvas, axes = new_canvas(len(result["points"]), 2, width=4.2)
    for row, (dataset, points) in enumerate(result["points"].items()):
        left, right = axes[row]
        shown = {"mnist": "MNIST", "cifar10": "CIFAR-10"}[dataset]
        for start, marker in (("trajectory", "o"), ("uniform", "s"), ("sgd", "^")):
            chosen = [p for p in points if p["found"] and p["start"] == start]
            if chosen:
                left.scatter(
                    [p["index"] for p in chosen], [100 * p["error"] for p in chosen], marker=marker, label=start
                )
        left.set(title=f"({'ac'[row]}) {shown}", xlabel=r"index $\alpha$", ylabel=r"training error $\epsilon$ (%)")
        left.legend(fontsize=8)
        edge = 3 * max((-point["lambda_min"] for point in result["spectra"][dataset]), default=1.0)
        for point in result["spectra"][dataset]:
            _draw_spectrum(right, point, edge)
        right.axvline(0, color="0.3", linewidth=0.8)
        right.set(title=f"({'bd'[row]}) {shown}", xlabel=r"eigenvalue $\lambda$", ylabel=r"$p(\lambda)$")
        right.set_yscale("log")
        right.legend(fontsize=8)
    return {"fig1": canvas}


def _draw_spectrum(axis: Any, point: Result, edge: float) -> None:
    """The distribution between ``-edge`` and ``edge``; a few large eigenvalues would squeeze the rest into one bin."""
    values = torch.tensor(point["eigenvalues"], dtype=torch.float64)
    counts, edges = torch.histogram(values, bins=31, range=(-edge, edge))
    middles, seen = (edges[1:] + edges[:-1]) / 2, counts > 0
    axis.plot(
        middles[seen], (counts / len(values))[seen], ".-", linewidth=1, label=f"error {100 * point['error']:.0f}%"
    )


def verdicts(result: Result) -> list[Verdict]:
    """The statements of Section 3."""
    found = []
    for dataset, points in result["points"].items():
        critical = [p for p in points if p["found"]]
        found.append(_monotone(dataset, critical, len(points), result["bound"]))
        found.append(_shift(dataset, result["spectra"][dataset]))
    return found


def _monotone(dataset: str, critical: Sequence[Result], searches: int, bound: float) -> Verdict:
    claim = f"{dataset}: the index of critical points grows with their error"
    count = f"{len(critical)} of {searches} searches ended with |gradient| <= {bound:g}"
    try:
        correlation = rank_correlation([p["index"] for p in critical], [p["loss"] for p in critical])
        classes = rank_correlation([p["index"] for p in critical], [p["error"] for p in critical])
    except ValueError:
        return Verdict(claim, f"{count}: too few for a correlation", NOT_REPRODUCED)
    measured = f"{count}; rank correlation of index and cross-entropy {correlation}, of index and error {classes}"
    return Verdict(claim, measured, verdict_of(correlation))


def _shift(dataset: str, spectra: Sequence[Result]) -> Verdict:
    """The share of negative eigenvalues grows, and so does the most negative one in units of the largest."""
    claim = f"{dataset}: the distribution of eigenvalues shifts to the left as the error grows"
    shares, sizes = [p["index"] for p in spectra], [_left_end(p) for p in spectra]
    measured = "low, middle, high error: negative share " + ", ".join(f"{s:.2f}" for s in shares)
    measured += "; |smallest| / largest eigenvalue " + ", ".join(f"{s:.2g}" for s in sizes)
    grows = sum(values == sorted(values) and len(set(values)) > 1 for values in (shares, sizes))
    return Verdict(claim, measured, (NOT_REPRODUCED, IN_PART, REPRODUCED)[grows])


def _left_end(point: Result) -> float:
    values = point["eigenvalues"]
    return max(-float(min(values)), 0.0) / max(float(max(values)), math.ulp(0.0))


def rows(result: Result) -> list[Result]:
    """One row for each search."""
    return [{"dataset": dataset} | point for dataset, points in result["points"].items() for point in points]


CAPTION = (
    "Critical points found by Newton's method on the gradient (float64; a point counts if its gradient's norm is below "
    "the bound). MNIST: from points on SFN trajectories after 0 to 20 epochs with uniform noise of amplitude 1e-1 to "
    "1e-4, and from weights uniform in [-1, 1]; one hidden layer. CIFAR-10 (as luminance): 3-layer tanh networks "
    "trained by SGD. Images shrunk by area averaging. Eigenvalues right of the "
    "drawn window are left out of (b, d). The paper prints no numbers for this figure."
)

FIGURE = Figure(
    name="fig1",
    title="Critical points: error against index, and spectra",
    scales={
        "small": Settings(
            image_size=5,
            cases=500,
            trajectory_points=3,
            uniform_points=2,
            sgd_epochs=(10, 100),
            networks=3,
            bound=2.5e-4,
            max_steps=200,
        ),
        "paper": Settings(),
    },
    seeds={"small": 5, "paper": 20},
    data=("mnist", "cifar10"),
    measure=measure,
    draw=draw,
    verdicts=verdicts,
    rows=rows,
    caption=CAPTION,
)
