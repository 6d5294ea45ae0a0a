"""The spectrum of a Hessian, without a Trainer: Ritz values with error bounds, index, loss and gradient norm."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.density import SpectralDensity, spectral_density
from lightning_sfn.newton.objective import Closure, Objective, ObjectiveError
from lightning_sfn.newton.operators import CurvatureName, ProductMethod, make_operator
from lightning_sfn.newton.options import is_number, is_whole, require_seed
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.precision import full_precision
from lightning_sfn.newton.reductions import norm
from lightning_sfn.newton.thick_restart import Ends, RitzValues, extreme_ritz_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Spectrum", "SpectrumSettings", "hessian_spectrum", "spectrum_of"]

_DEFAULT_KRYLOV_DIM = 64
_BUDGET = 4  # products that may be spent on convergence, in bases


@dataclass(frozen=True)
class SpectrumSettings:
    """What is asked of a spectrum; `hessian_spectrum`, `HessianSpectrum` and ``lightning-sfn spectrum`` share it.

    Attributes:
        krylov_dim: Lanczos vectors held at a time, each one Hessian-vector product; no more than there are parameters
            are used.
        smallest: Eigenvalues asked for at the lower end; no more than half of ``krylov_dim`` are.
        largest: Eigenvalues asked for at the upper end, likewise.
        tol: Bound on the residuals of those, relative to each: Lanczos is restarted until they meet it. ``None`` takes
            one basis as it comes.
        max_products: Hessian-vector products after which restarts end; four times ``krylov_dim`` if left out.
        density_probes: Random vectors for the spectral density, each ``krylov_dim`` more products; 0 for no density.

    Raises:
        ValueError: A number is out of its range.
    """

    krylov_dim: int = _DEFAULT_KRYLOV_DIM
    smallest: int = 1
    largest: int = 1
    tol: float | None = None
    max_products: int | None = None
    density_probes: int = 0

    def __post_init__(self) -> None:
        least = {"krylov_dim": 1, "smallest": 0, "largest": 0, "max_products": self.krylov_dim, "density_probes": 0}
        for name, bound in least.items():
            number = getattr(self, name)
            if number is None and name == "max_products":
                continue
            if not is_whole(number) or number < bound:
                raise ValueError(f"{name} is {number!r}, but a whole number of at least {bound} is expected.")
            object.__setattr__(self, name, int(number))  # frozen for everybody else
        if self.tol is not None and not (is_number(self.tol) and 0 < self.tol < 1):
            raise ValueError(f"tol is {self.tol!r}, but a number between 0 and 1, or None, is expected.")

    @property
    def ends(self) -> Ends:
        """Which eigenvalues have to converge, and how well."""
        half = max(self.krylov_dim // 2, 1)
        return Ends(min(self.smallest, half), min(self.largest, half), self.tol or 0.0)

    def most_ritz_products(self, size: int) -> int:
        """The most products that the Ritz values of a matrix of ``size`` rows may take."""
        if self.tol is not None and self.max_products is not None:
            return self.max_products
        return min(self.krylov_dim, size) * (1 if self.tol is None else _BUDGET)

    def most_products(self, size: int) -> int:
        """The most products that a spectrum may take, density included."""
        return self.most_ritz_products(size) + self.density_probes * min(self.krylov_dim, size)


@dataclass(frozen=True)
class Spectrum:
    """Ritz values of a Hessian on a Krylov subspace.

    Attributes:
        eigenvalues: Ritz values in ascending order, float64, shape ``(k,)``. Every one lies between the Hessian's
            smallest and largest eigenvalue, and the ends converge first. Empty where no product was finite.
        residuals: Error bounds: within ``residuals[i]`` of ``eigenvalues[i]`` there is an eigenvalue. With finite
            differences a typical error of theirs is part of it, which is no bound for losses that are far from smooth.
        loss: The loss at which the Hessian was taken.
        gradient_norm: Norm of the gradient there.
        products: Hessian-vector products spent.
        converged: Whether all eigenvalues asked for met their tolerance; ``None`` where none was asked.
        nonfinite: How many numbers of the gradient, or of the first Hessian-vector product that had any, were not
            finite. Where this is not 0 the spectrum holds what was known before.
        density: The spectral density, if it was asked for.
        size: Number of parameters, n; 0 if unknown.
        rounding: The part of every residual that is rounding, or the error of finite differences.
    """

    eigenvalues: Tensor
    residuals: Tensor
    loss: float
    gradient_norm: float
    products: int
    converged: bool | None = None
    nonfinite: int = 0
    density: SpectralDensity | None = None
    size: int = 0
    rounding: float = 0.0

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value: an upper bound on the smallest eigenvalue; NaN if there is none."""
        return float(self.eigenvalues[0]) if len(self.eigenvalues) else math.nan

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value: a lower bound on the largest eigenvalue; NaN if there is none."""
        return float(self.eigenvalues[-1]) if len(self.eigenvalues) else math.nan

    @property
    def residual_max(self) -> float:
        """The larger of the error bounds of `lambda_min` and `lambda_max`; NaN if there are none."""
        return max(float(self.residuals[0]), float(self.residuals[-1])) if len(self.residuals) else math.nan

    @property
    def negative_fraction(self) -> float:
        """Share of the Ritz values that are negative beyond rounding (the paper's index alpha, within the subspace).

        A negative Ritz value is a direction of negative curvature, whatever its residual: that bounds the distance to
        an eigenvalue, and the smallest eigenvalue is no larger.

        NaN if there are none. The share among all n eigenvalues is ``density.below(0.0)``.
        """
        if not len(self.eigenvalues):
            return math.nan
        return float((self.eigenvalues < -self.rounding).double().mean())

    @property
    def has_negative_curvature(self) -> bool:
        """Whether the smallest eigenvalue is negative for certain: it is no larger than the smallest Ritz value."""
        return self.lambda_min < -self.rounding

    def extremes(self, smallest: int, largest: int) -> list[tuple[str, float, float]]:
        """The outermost Ritz values: name, value and error bound of each.

        Args:
            smallest: How many of the lower end, as ``smallest_00`` (the outermost) and so on.
            largest: How many of the upper end, as ``largest_00`` and so on.
        """
        values, bounds = self.eigenvalues.tolist(), self.residuals.tolist()
        low = [(f"smallest_{i:02d}", values[i], bounds[i]) for i in range(min(smallest, len(values)))]
        high = [(f"largest_{i:02d}", values[-1 - i], bounds[-1 - i]) for i in range(min(largest, len(values)))]
        return low + high

    def __str__(self) -> str:
        """The numbers in one line."""
        return (
            f"eigenvalues from {self.lambda_min:.4g} to {self.lambda_max:.4g} (error up to {self.residual_max:.1g}), "
            f"{self.negative_fraction:.0%} of {len(self.eigenvalues)} Ritz values negative; loss {self.loss:.6g}, "
            f"gradient norm {self.gradient_norm:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            "eigenvalues": self.eigenvalues.tolist(),
            "residuals": self.residuals.tolist(),
            "lambda_min": self.lambda_min,
            "lambda_max": self.lambda_max,
            "negative_fraction": self.negative_fraction,
            "gradient_norm": self.gradient_norm,
            "loss": self.loss,
            "products": self.products,
            "converged": self.converged,
            "nonfinite": self.nonfinite,
            "size": self.size,
            "rounding": self.rounding,
            "density": None if self.density is None else self.density.to_dict(),
        }

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Spectrum:
        """The spectrum that `to_dict` gave."""
        given = {name: entries[name] for name in cls.__dataclass_fields__ if name in entries}
        for name in ("eigenvalues", "residuals"):
            given[name] = torch.as_tensor(given[name], dtype=torch.float64, device="cpu")
        if given["eigenvalues"].shape != given["residuals"].shape:
            raise ValueError("There are not as many residuals as eigenvalues.")
        if "rounding" not in given and len(given["residuals"]):  # of an earlier version: each residual includes it
            given["rounding"] = float(given["residuals"].min())
        if given.get("density") is not None:
            given["density"] = SpectralDensity.from_dict(given["density"])
        return cls(**given)

    def save(self, path: str | os.PathLike[str], **notes: Any) -> None:
        """Writes the spectrum as JSON; a file of that name is replaced once the new one is whole.

        Args:
            path: The file.
            **notes: More entries to write beside those of `to_dict`.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(notes | self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectrum:
        """Reads what `save` wrote.

        Args:
            path: The file.

        Raises:
            ValueError: It is not the JSON of a spectrum.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold a spectrum: give a file that Spectrum.save wrote.") from error

    def plot(self) -> Figure:
        """Draws the Ritz values with their error bounds, and the density if there is one.

        Returns:
            A matplotlib figure that belongs to no window: ``figure.savefig("spectrum.png")``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from lightning_sfn.newton.figures import spectrum_figure

        return spectrum_figure(self)


def hessian_spectrum(
    closure: Closure,
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    krylov_dim: int | Literal["full"] | None = None,
    *,
    smallest: int = 1,
    largest: int = 1,
    tol: float | None = None,
    max_products: int | None = None,
    density_probes: int = 0,
    curvature: CurvatureName = "hessian",
    hvp: ProductMethod = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """Ritz values of the Hessian of a loss, by Lanczos from a random vector.

    Args:
        closure: Returns the loss with its graph (with another curvature than the Hessian a pair, see there). It is
            evaluated a few times, must be one fixed function, and must not call ``backward``.
        params: The parameters, named or not; nothing about them is changed.
        krylov_dim: Number of Lanczos vectors, each one Hessian-vector product; ``"full"`` for as many as there are
            parameters. 64 (or the number of parameters, if smaller) when left out.
        smallest: Eigenvalues asked for at the lower end, with ``tol``.
        largest: Eigenvalues asked for at the upper end, with ``tol``.
        tol: Restart Lanczos until the residuals of those are below this share of each; ``None`` takes one basis.
        max_products: Hessian-vector products after which restarts end; four times ``krylov_dim`` if left out.
        density_probes: Random vectors for the spectral density; 0 for no density.
        curvature: ``"hessian"``; or, with a closure that returns a pair, ``"gauss_newton"`` for ``(loss, output)``,
            ``"fisher"`` for ``(loss, distribution)`` or ``"gradient_covariance"`` for ``(loss, losses of the cases)``.
        hvp: ``"auto"``, ``"retain"``, ``"recompute"`` or, for the Hessian, ``"finite_difference"``, as in
            `SaddleFreeNewton`.
        seed: Seed of the random vectors.
        progress: Called after each product with the number of products so far and the most there can be.

    Returns:
        The spectrum.

    Raises:
        ValueError: ``krylov_dim`` is not between 1 and the number of parameters, another number is out of its range, or
            a name is unknown.
        ObjectiveError: The loss depends on none of the parameters, or is another one when it is evaluated again.
        CurvatureError: An operation has no second derivative.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> hessian_spectrum(lambda: 5 * x[0] ** 2 - x[1] ** 2, [x], krylov_dim=2).eigenvalues.round(decimals=4)
        tensor([-2., 10.], dtype=torch.float64)
    """
    parameters = FlatParameters(params)
    if krylov_dim is None or krylov_dim == "full":
        krylov_dim = parameters.size if krylov_dim else min(_DEFAULT_KRYLOV_DIM, parameters.size)
    if not (is_whole(krylov_dim) and 1 <= krylov_dim <= parameters.size):
        raise ValueError(
            f"krylov_dim is {krylov_dim!r}, but a number from 1 to {parameters.size} (all parameters) is expected."
        )
    settings = SpectrumSettings(krylov_dim, smallest, largest, tol, max_products, density_probes)
    objective = Objective([closure])
    with full_precision(tf32=False):
        operator = make_operator(objective, parameters, curvature, hvp)
        spectrum = spectrum_of(operator, settings, seed=seed, progress=progress)
        if not spectrum.nonfinite:
            objective.require_repeatable(spectrum.loss)
        if spectrum.gradient_norm == 0 and not spectrum.eigenvalues.any():  # flat, or another model's parameters
            _require_used(objective, parameters)
    return spectrum


def _require_used(objective: Objective, parameters: FlatParameters) -> None:
    with torch.enable_grad():
        gradient = torch.autograd.grad(objective.evaluate(0).loss, parameters.tensors, allow_unused=True)
    if all(piece is None for piece in gradient):
        raise ObjectiveError("The loss depends on none of the parameters: give those of the model that it comes from.")


@full_precision(tf32=False)
def spectrum_of(
    operator: CurvatureOperator,
    settings: SpectrumSettings,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """Ritz values of a curvature operator, by Lanczos from a random vector.

    Args:
        operator: The operator; it is closed afterwards.
        settings: What is asked for.
        seed: Seed of the random vectors.
        progress: Called after each product with the number of products so far and the most there can be.

    Returns:
        The spectrum.
    """
    size, seed = operator.parameters.size, require_seed(seed)
    at_most = settings.most_products(size)
    image = torch.empty(size, dtype=operator.parameters.dtype, device=operator.parameters.device)

    def matvec(vector: Tensor) -> Tensor:
        nonlocal image
        image = operator.matvec_into(vector, image)
        operator.objective.require_sound(image, far=True)  # an evaluation that failed is no number to count
        if progress is not None:
            progress(operator.products, at_most)
        return image

    ritz, density = RitzValues.none(), None
    with torch.no_grad():
        try:
            loss, gradient = operator.loss_and_gradient()
            nonfinite = _count_nonfinite(gradient) + (not math.isfinite(loss))
            generator = torch.Generator(gradient.device).manual_seed(seed)
            if not nonfinite:
                start = torch.randn(size, dtype=gradient.dtype, device=gradient.device, generator=generator)
                ritz = extreme_ritz_values(
                    matvec,
                    start,
                    settings.krylov_dim,
                    settings.ends,
                    max_products=settings.most_ritz_products(size),
                    generator=generator,
                )
                nonfinite = _count_nonfinite(image)  # Lanczos ends with the first such product
            if settings.density_probes and not nonfinite:
                density = spectral_density(
                    matvec, gradient, settings.krylov_dim, settings.density_probes, generator=generator
                )
                nonfinite = _count_nonfinite(image)
        finally:
            operator.close()
    off = operator.inaccuracy * float(ritz.values.abs().max()) if len(ritz.values) else 0.0
    return Spectrum(
        eigenvalues=ritz.values,
        residuals=torch.hypot(ritz.residuals, torch.full_like(ritz.residuals, off)) if off else ritz.residuals,
        loss=loss,
        gradient_norm=float(norm(gradient)),
        products=operator.products,
        converged=None if settings.tol is None else ritz.converged,
        nonfinite=nonfinite,
        density=density,
        size=size,
        rounding=math.hypot(ritz.rounding, off),
    )


def _count_nonfinite(vector: Tensor) -> int:
    return int(vector.isfinite().logical_not().sum())
