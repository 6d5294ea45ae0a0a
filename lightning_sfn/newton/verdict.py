"""What a spectrum says, in words: saddle, minimum, slope, or not known. Never more than its error bounds allow."""

from dataclasses import dataclass

from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.spectrum import Spectrum

__all__ = ["NewtonTrial", "try_newton_step", "verdict"]

_STATIONARY = 1e-2  # share of the loss that one step may still gain at what is called a critical point
_FLAT = 1e-3  # of the largest eigenvalue: curvature below this is zero to tolerance


@dataclass(frozen=True)
class NewtonTrial:
    """One SFN step that was tried and taken back.

    Attributes:
        loss: The loss before it.
        predicted: The decrease that its quadratic model predicts.
        measured: The decrease that was measured; 0 if no step lowers the loss.
    """

    loss: float
    predicted: float
    measured: float


def try_newton_step(objective: Objective, parameters: FlatParameters) -> NewtonTrial:
    """Takes one SFN step with the defaults of `SaddleFreeNewton`, less quasi-Newton steps, and undoes it.

    Args:
        objective: What the step and its trial losses see.
        parameters: The parameters; bit for bit what they were afterwards.

    Returns:
        What the step promised and what it gained.

    Raises:
        ObjectiveError: The loss cannot be optimized, or is not a fixed function.
        CurvatureError: An operation has no second derivative.
        FloatingPointError: Loss, gradient or curvature is not finite.
    """
    origin = parameters.read()
    optimizer = SaddleFreeNewton(parameters.tensors, secant_steps=0, processes=objective.processes)
    try:
        record = optimizer.step_on(objective)
    finally:
        parameters.write(origin)
    return NewtonTrial(record.loss_before, record.predicted_decrease, record.loss_before - record.loss_after)


def verdict(spectrum: Spectrum, trial: NewtonTrial | None = None) -> str:
    """Names the kind of point that a spectrum was taken at.

    The point counts as critical if a gradient step of the length that the largest eigenvalue allows gains less than a
    hundredth of the loss, and an SFN step no more by its quadratic model: along directions of little curvature a
    gradient step gains next to nothing, however far the minimum is. If the step has gained more than that, the point is
    no minimum; it may be a saddle, from which one step can lead far away.

    The smallest eigenvalue is negative for certain if its estimate is, beyond rounding, since that is an upper bound on
    it; it counts as zero to tolerance if its error bound cannot take it below a thousandth of the largest. Where
    gradient and curvature are both exactly zero, the kind of point is unknown: second derivatives do not tell.

    Args:
        spectrum: The spectrum.
        trial: One SFN step tried on the same data, if there is one.

    Returns:
        One or two sentences; the first word is ``saddle``, ``slope``, ``minimum``, ``not converged`` or ``unknown``.
    """
    if spectrum.nonfinite or not len(spectrum.eigenvalues):
        return (
            f"unknown: {spectrum.nonfinite} numbers of the gradient or of a Hessian-vector product are not finite at "
            f"loss {spectrum.loss:.6g}; look for the batch or the operation that makes them."
        )
    lowest, bound = spectrum.lambda_min, float(spectrum.residuals[0])
    scale = max(abs(lowest), abs(spectrum.lambda_max))
    if scale == spectrum.gradient_norm == 0:
        return "unknown: gradient and curvature are zero, which a minimum, a plateau and a saddle of high order share."
    negative = spectrum.has_negative_curvature
    little = _STATIONARY * abs(spectrum.loss)
    steep = scale == 0 or spectrum.gradient_norm**2 / (2 * scale) > little
    gain = 0.0 if trial is None else trial.predicted if negative else max(trial.predicted, trial.measured)
    facts = (
        f"the smallest eigenvalue is {lowest:.3g} (+- {bound:.1g}), the largest {spectrum.lambda_max:.3g}, "
        f"the gradient norm {spectrum.gradient_norm:.3g}"
    )
    if not negative and lowest - bound < -_FLAT * scale:
        return (
            f"not converged: {facts}, so its sign is open; allow more products, or more vectors (krylov_dim)."
            + _newton(trial)
        )
    if steep or gain > little:
        kind = "slope, with negative curvature" if negative else "slope"
        why = "the gradient is not small" if steep else "a Newton step gains more than a hundredth of the loss"
        return f"{kind}: {facts}; {why}, so this is no critical point yet." + _newton(trial)
    if negative:
        return f"saddle: {facts}, so this is no minimum." + _newton(trial)
    return (
        f"minimum to tolerance: {facts}; no direction of negative curvature was found among "
        f"{len(spectrum.eigenvalues)} Lanczos vectors." + _newton(trial)
    )


def _newton(trial: NewtonTrial | None) -> str:
    if trial is None:
        return ""
    if trial.measured <= 0:
        return " One SFN step does not lower the loss on these data."
    share = f" ({trial.measured / abs(trial.loss):.2g} of the loss)" if trial.loss else ""
    return (
        f" SFN predicts a decrease of {trial.predicted:.3g} in one step; tried on these data it lowers the loss by "
        f"{trial.measured:.3g}{share}."
    )
