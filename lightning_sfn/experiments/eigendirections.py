"""Section 4 at a saddle point of a small perceptron: what each method does along eigenvectors of the Hessian."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional as F

from lightning_sfn.experiments.critical_points import find_critical_point
from lightning_sfn.experiments.figure import COLOURS, NOT_REPRODUCED, REPRODUCED, Context, Verdict, new_canvas
from lightning_sfn.experiments.figure3_runs import CLASSES, load
from lightning_sfn.experiments.perceptron import Perceptron
from lightning_sfn.experiments.runner import Job, Result
from lightning_sfn.newton import FisherOperator, FlatParameters, GradientCovarianceOperator, HessianOperator, Objective
from lightning_sfn.newton.curvature import gradient_of
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.subspace_descent import KrylovSubspaceDescent
from lightning_sfn.newton.trust_region import RULES

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["METHODS", "closed_form", "steps_along_eigenvectors"]

METHODS = ("gradient", "newton", "damped_newton", "truncated_newton", "natural_gradient", "tonga", "ksd", "saddle_free")
LABELS = {
    "gradient": "gradient descent",
    "newton": "Newton",
    "damped_newton": "trust region",
    "truncated_newton": "truncated Newton",
    "natural_gradient": "natural gradient",
    "tonga": "TONGA",
    "ksd": "Krylov subspace descent",
    "saddle_free": "SFN",
}
DISPLACEMENT = 1e-6
"""Length of the displacement from the saddle point: the quadratic model is exact to a share of about this size."""

_VISIBLE = 1e-4  # displacement for a method that compares losses, whose differences must not drown in rounding
_EDGE = 0.1  # how much the trust region's damping exceeds the most negative eigenvalue, as a share of it
_DAMPING = 1e-3  # of natural gradient and of TONGA, whose matrices are singular
_FLAT = 1e-8  # of the largest eigenvalue: what rounding cannot tell from zero
_PIXELS, _CASES, _HIDDEN = 4, 300, 3


def closed_form(method: str, eigenvalue: float, lowest: float) -> float | None:
    """The step along an eigenvector per unit of displacement, as Section 4 has it.

    Args:
        method: One of `METHODS`.
        eigenvalue: The eigenvector's eigenvalue.
        lowest: The most negative eigenvalue.

    Returns:
        The component of the step along the displacement, or None where the text gives no formula.
    """
    trust = (1 + _EDGE) * abs(lowest)
    forms: dict[str, float] = {
        "gradient": -eigenvalue,
        "newton": -1.0,
        "damped_newton": -eigenvalue / (eigenvalue + trust),
        "truncated_newton": -1.0 if eigenvalue > 0 else 0.0,
        "saddle_free": -1.0 if eigenvalue > 0 else 1.0,
    }
    return forms.get(method)


def steps_along_eigenvectors(*, source: str, seed: int, device: str) -> Result:
    """Finds a saddle point, moves a little along single eigenvectors, and takes each method's step from there.

    Args:
        source: Where MNIST comes from.
        seed: Seed of the start of the search.
        device: Where to compute.

    Returns:
        The saddle point, and for each method the step's component along each displacement, per unit of it.
    """
    images, labels = (tensor.to(device) for tensor in load("mnist", source, _PIXELS, _CASES))
    torch.manual_seed(seed)
    model = Perceptron((_PIXELS**2, _HIDDEN, CLASSES)).double().to(device)
    parameters = FlatParameters(model.parameters())
    point = find_critical_point(lambda: model.loss(images, labels), parameters, bound=1e-9, max_steps=500)
    objective = Objective([lambda: model.loss(images, labels)])
    values, vectors = torch.linalg.eigh(dense_matrix(HessianOperator(objective, parameters)))
    centre = parameters.read()
    chosen = _spread(values)
    steps: dict[str, list[float]] = {method: [] for method in METHODS}
    for index in chosen:
        direction = vectors[:, index].to(device)
        for method in METHODS:
            length = DISPLACEMENT if method != "ksd" else _VISIBLE
            parameters.write(centre + length * direction)
            step = _step(method, model, images, labels, parameters, float(values[0]))
            steps[method].append(float(step @ direction) / length)
    return {
        "seed": seed,
        "found": point.found,
        "gradient_norm": point.gradient_norm,
        "loss": point.loss,
        "index": point.index,
        "lambda_min": float(values[0]),
        "eigenvalues": [float(values[i]) for i in chosen],
        "steps": steps,
    }


def _spread(values: Tensor) -> list[int]:
    """Indices of eigenvectors that are clearly not flat: the three lowest, some between, the three highest."""
    clear = [i for i in range(len(values)) if abs(float(values[i])) > 1e-2 * float(values.abs().max())]
    negative, positive = [i for i in clear if values[i] < 0], [i for i in clear if values[i] > 0]
    return negative[:4] + positive[-4:]


def _step(
    method: str, model: Perceptron, images: Tensor, labels: Tensor, parameters: FlatParameters, lowest: float
) -> Tensor:
    """A method's step from the present point; the parameters are left where they are."""
    if method == "ksd":
        twin = copy.deepcopy(model)
        optimizer = KrylovSubspaceDescent(twin.parameters(), 10, bfgs_steps=10)
        optimizer.step(lambda: twin.loss(images, labels))
        return FlatParameters(twin.parameters()).read() - parameters.read()
    objective = Objective([_pairs(method, model, images, labels)])
    kind = {"natural_gradient": FisherOperator, "tonga": GradientCovarianceOperator}.get(method, HessianOperator)
    matrix = dense_matrix(kind(objective, parameters))
    _, gradient = gradient_of(objective, parameters)
    values, vectors = torch.linalg.eigh(matrix)
    # Flat directions (dead pixels, the softmax's shift) have eigenvalues and gradients of rounding size.
    values = torch.where(values.abs() > _FLAT * values.abs().max(), values, 0.0)
    # The rules are those of the optimizer; natural gradient and TONGA put another matrix in the Hessian's place.
    rule = RULES.get(method, RULES["damped_newton"])
    damping = {"damped_newton": (1 + _EDGE) * abs(lowest), "saddle_free": _FLAT, "truncated_newton": _FLAT}
    added = torch.tensor(damping.get(method, _DAMPING), dtype=torch.float64)
    step = -(vectors @ (rule.inverse(values, added) * (vectors.T @ gradient.cpu())))
    moved: Tensor = step.to(gradient.device)
    return moved


def _pairs(method: str, model: Perceptron, images: Tensor, labels: Tensor) -> Callable[[], Any]:
    def closure() -> Any:
        logits = model(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if method == "natural_gradient":
            return losses.mean(), Categorical(logits=logits)
        return (losses.mean(), losses) if method == "tonga" else losses.mean()

    return closure


def measure(context: Context) -> list[Result]:
    """One saddle point for each seed."""
    shared = {"source": context.sources.mnist, "device": context.device}
    jobs = [Job(f"section4-{seed}", steps_along_eigenvectors, shared | {"seed": seed}) for seed in context.seeds]
    return list(context.runner.run(jobs, "fig2 eigendirections").values())


def draw(runs: list[Result]) -> Canvas:
    """The step along each eigenvector per unit of displacement, with the closed forms as lines."""
    canvas, axes = new_canvas(1, 1, width=6.5, height=3.6)
    axis = axes[0][0]
    colours = {"gradient": COLOURS["sgd"], "natural_gradient": "tab:brown", "tonga": "tab:pink", "ksd": "0.5"} | COLOURS
    for offset, method in enumerate(METHODS):
        values = runs[0]["eigenvalues"]
        x = [i + (offset - len(METHODS) / 2 + 0.5) * 0.1 for i in range(len(values))]
        axis.bar(x, runs[0]["steps"][method], width=0.1, color=colours[method], label=LABELS[method])
        forms = [closed_form(method, value, runs[0]["lambda_min"]) for value in values]
        known = [(a, b) for a, b in zip(x, forms, strict=True) if b is not None]
        if known:
            axis.plot(*zip(*known, strict=True), "k_", markersize=5)
    axis.axhline(0, color="0.2", linewidth=0.8)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_xticks(range(len(runs[0]["eigenvalues"])), [f"{v:.2g}" for v in runs[0]["eigenvalues"]])
    axis.set(xlabel="eigenvalue of the direction", ylabel="step along it / displacement")
    axis.set_title("positive: away from the saddle; black marks: the closed forms of Section 4", fontsize=9)
    axis.legend(fontsize=7, ncols=2)
    return canvas


def verdicts(runs: list[Result]) -> list[Verdict]:
    """What Section 4 says of each method at a saddle point of a network."""
    worst = max(
        abs(step - form)
        for run in runs
        for method in METHODS
        for value, step in zip(run["eigenvalues"], run["steps"][method], strict=True)
        if (form := closed_form(method, value, run["lambda_min"])) is not None
    )
    negative = [d for d in _directions(runs) if d["eigenvalue"] < 0]
    natural = [d["natural_gradient"] / d["saddle_free"] for d in _directions(runs)]
    tonga = [d["tonga"] for d in negative]
    return [
        _fact(
            "each method's step along eigenvectors is that of the text", worst < 0.05, f"largest difference {worst:.1e}"
        ),
        _fact(
            "natural gradient's rescaling is not optimal in all directions",
            min(natural) > 0 and max(natural) > 2 * min(natural),
            f"it goes the right way, {min(natural):.3g} to {max(natural):.3g} times as far as SFN",
        ),
        _fact(
            "TONGA's steps near the critical point are much larger than needed",
            min(tonga) > 2,
            f"along negative curvature {min(tonga):.3g} to {max(tonga):.3g} displacements, SFN 1",
        ),
        _fact(
            "Krylov subspace descent leaves the saddle",
            min(d["ksd"] for d in negative) > 1,
            f"along negative curvature {min(d['ksd'] for d in negative):.3g} displacements or more",
        ),
    ]


def _directions(runs: list[Result]) -> list[dict[str, float]]:
    """Every direction of every saddle point: its eigenvalue, and each method's step."""
    return [
        {"eigenvalue": value} | {method: run["steps"][method][i] for method in METHODS}
        for run in runs
        for i, value in enumerate(run["eigenvalues"])
    ]


def _fact(claim: str, holds: bool, measured: str) -> Verdict:
    return Verdict(claim, measured, REPRODUCED if holds else NOT_REPRODUCED)
