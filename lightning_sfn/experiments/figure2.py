"""Figure 2, Figure 5 and Section 4: what each method does near critical points, against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sfn.experiments import eigendirections
from lightning_sfn.experiments.figure import (
    COLOURS,
    NAMES,
    NOT_REPRODUCED,
    REPRODUCED,
    Context,
    Figure,
    Verdict,
    new_canvas,
)
from lightning_sfn.experiments.runner import Job, Result
from lightning_sfn.newton.trust_region import RULES

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["FIGURE", "SURFACES", "Settings", "trajectory"]


@dataclass(frozen=True)
class Surface:
    """A function of two variables with a critical point of interest.

    Attributes:
        formula: For titles.
        function: Maps a tensor of shape (2,) (or (2, ...) to plot) to the value.
        start: Where trajectories begin.
        window: Half the side of the square that is drawn.
    """

    formula: str
    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    window: float = 1.2


def _gutter(p: Tensor) -> Tensor:
    radius = p[0] ** 2 + p[1] ** 2
    return (radius - 1) ** 2


SURFACES = {
    "saddle": Surface("5x^2 - y^2", lambda p: 5 * p[0] ** 2 - p[1] ** 2, (0.9, 0.05)),
    "monkey": Surface("x^3 - 3xy^2", lambda p: p[0] ** 3 - 3 * p[0] * p[1] ** 2, (0.6, 0.45)),
    "gutter": Surface("(x^2 + y^2 - 1)^2", _gutter, (0.25, 0.1), 1.5),
    "cubic": Surface("x^3", lambda p: p[0] ** 3 + 0 * p[1], (0.8, 0.0)),
}
"""The critical points of Figures 2 and 5."""

METHODS = ("sgd", "newton", "damped_newton", "saddle_free")


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        steps: Steps of each method.
        lr: Learning rate of gradient descent.
        damping: Damping of damped Newton and of SFN, added to every eigenvalue.
        margin: What the trust region's damping exceeds the most negative eigenvalue by.
        escape: Distance from the start at which a trajectory has left and ends.
    """

    steps: int = 40
    lr: float = 0.05
    damping: float = 1e-6
    margin: float = 0.5
    escape: float = 3.0


def trajectory(surface: str, method: str, settings: Settings) -> Result:
    """Steps of one method from the start of one surface, with the exact Hessian.

    Args:
        surface: A key of `SURFACES`.
        method: ``"sgd"`` (full gradient), ``"newton"``, ``"damped_newton"`` (a trust region: the damping is the most
            negative eigenvalue's size plus a margin, so that every direction descends) or ``"saddle_free"``.
        settings: Sizes.

    Returns:
        The points visited and the values there; it ends where it has left the neighbourhood.
    """
    function = SURFACES[surface].function
    point = torch.tensor(SURFACES[surface].start, dtype=torch.float64)
    points, values = [point.tolist()], [float(function(point))]
    for _ in range(settings.steps):
        point = point + step_at(function, point, method, settings)
        points.append(point.tolist())
        values.append(float(function(point)))
        if float(point.norm()) > settings.escape:
            break
    return {"surface": surface, "method": method, "points": points, "values": values}


def step_at(function: Callable[[Tensor], Tensor], point: Tensor, method: str, settings: Settings) -> Tensor:
    """One step of a method at a point, by the rules of `SaddleFreeNewton`, with all eigenvectors.

    Returns:
        The step, shape (2,).
    """
    gradient: Tensor = torch.func.grad(function)(point)
    if method == "sgd":
        return -settings.lr * gradient
    values, vectors = torch.linalg.eigh(torch.func.hessian(function)(point))
    damping = settings.damping
    if method == "damped_newton":
        damping = max(-float(values[0]), 0.0) + settings.margin
    scales = RULES[method].inverse(values, torch.tensor(damping, dtype=torch.float64))
    step: Tensor = -(vectors @ (scales * (vectors.T @ gradient)))
    return step


def measure(settings: Settings, context: Context) -> Result:
    """All trajectories, and the steps of Section 4's methods along each eigenvector."""
    jobs = [
        Job(f"{surface}-{method}", trajectory, {"surface": surface, "method": method, "settings": settings})
        for surface in SURFACES
        for method in METHODS
    ]
    trajectories = context.runner.run(jobs, "fig2 trajectories")
    return {"trajectories": list(trajectories.values()), "section4": eigendirections.measure(context)}


def draw(result: Result) -> dict[str, Canvas]:
    """The trajectories over contours, and the steps along eigenvectors."""
    canvas, axes = new_canvas(2, 2, width=3.6, height=3.3)
    for (name, surface), axis, letter in zip(SURFACES.items(), axes.flat, "abcd", strict=True):
        _draw_contours(axis, surface)
        for run in (r for r in result["trajectories"] if r["surface"] == name):
            xs, ys = zip(*run["points"], strict=True)
            axis.plot(
                xs, ys, ".-", color=COLOURS[run["method"]], label=NAMES[run["method"]], linewidth=1.2, markersize=4
            )
        axis.plot(*surface.start, "o", color="gold", markersize=8, markeredgecolor="0.2", zorder=5)
        axis.set(xlim=(-surface.window, surface.window), ylim=(-surface.window, surface.window))
        axis.set_title(f"({letter}) ${surface.formula}$", fontsize=10)
    axes[0][0].legend(fontsize=7, loc="lower left")
    return {"fig2": canvas, "fig2_methods": eigendirections.draw(result["section4"])}


def _draw_contours(axis: Any, surface: Surface) -> None:
    ticks = torch.linspace(-surface.window, surface.window, 101, dtype=torch.float64)
    x, y = torch.meshgrid(ticks, ticks, indexing="xy")
    axis.contour(x, y, surface.function(torch.stack([x, y])), levels=25, colors="0.75", linewidths=0.6)


def verdicts(result: Result) -> list[Verdict]:
    """What Section 4 says of each method, step by step."""
    paths = {(r["surface"], r["method"]): r for r in result["trajectories"]}

    def distances(surface: str, method: str) -> list[float]:
        return [float(torch.tensor(p).norm()) for p in paths[surface, method]["points"]]

    def left(surface: str, method: str) -> int | None:
        """The first step at which the distance from the critical point exceeds 1."""
        return next((i for i, d in enumerate(distances(surface, method)) if d > 1), None)

    newton = distances("saddle", "newton")[-1]
    sfn, sgd = left("saddle", "saddle_free"), left("saddle", "sgd")
    first = SURFACES["saddle"].start[0]
    trust, sharp = (abs(paths["saddle", m]["points"][1][0]) / first for m in ("damped_newton", "saddle_free"))
    monkey = distances("monkey", "newton")[-1]
    values = paths["monkey", "saddle_free"]["values"]
    return [
        _fact("the saddle attracts Newton's method", newton < 1e-6, f"it ends at distance {newton:.1e} after one step"),
        _fact(
            "SFN escapes faster than gradient descent",
            sfn is not None and (sgd is None or sfn < sgd),
            f"steps to distance 1: SFN {sfn}, gradient descent {sgd}",
        ),
        _fact(
            "the trust region's damping shortens its steps in other directions",
            trust > 100 * sharp,
            f"share of x that is left after one step: trust region {trust:.2g}, SFN {sharp:.1g}",
        ),
        _fact(
            "the monkey saddle attracts Newton's method and not SFN",
            monkey < 1e-3 and min(values) < values[0],
            f"Newton ends at distance {monkey:.1e}; SFN's value goes from {values[0]:.3g} to {min(values):.3g}",
        ),
        *eigendirections.verdicts(result["section4"]),
    ]


def _fact(claim: str, holds: bool, measured: str) -> Verdict:
    return Verdict(claim, measured, REPRODUCED if holds else NOT_REPRODUCED)


def rows(result: Result) -> list[Result]:
    """One row for each point of each trajectory."""
    return [
        {"surface": run["surface"], "method": run["method"], "step": step, "x": x, "y": y, "value": value}
        for run in result["trajectories"]
        for step, ((x, y), value) in enumerate(zip(run["points"], run["values"], strict=True))
    ]


CAPTION = (
    "Trajectories of full-gradient descent (learning rate 0.05), Newton's method, damped Newton as a trust region "
    "(damping: the most negative eigenvalue's size plus 0.5) and SFN (damping 1e-6), from the yellow dot; float64, "
    "exact Hessian. (a, b) the paper's Figure 2; (c, d) the gutter and the degenerate point of its Figure 5. "
    "fig2_methods: the step of each method of Section 4 along eigenvectors of the Hessian at a saddle point of a small "
    "perceptron, per unit of displacement, beside the closed forms of the text."
)

FIGURE = Figure(
    name="fig2",
    title="Trajectories near saddle points, and steps along eigenvectors",
    scales={"small": Settings(), "paper": Settings()},
    seeds={"small": 1, "paper": 1},
    data=("mnist",),
    measure=measure,
    draw=draw,
    verdicts=verdicts,
    rows=rows,
    caption=CAPTION,
)
