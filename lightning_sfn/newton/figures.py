"""Pictures of spectra. This file alone draws; matplotlib is needed when a figure is asked for, not before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sfn.newton.density import SpectralDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_sfn.newton.spectrum import Spectrum

__all__ = ["density_figure", "index_figure", "spectrum_figure"]

_NEGATIVE, _POSITIVE, _BAND = "#c0392b", "#2c6fa6", "#b8cfe4"
_GRID_POINTS = 800
_LINEAR_SHARE = 1e-4  # of the largest eigenvalue: the linear part of the symmetric logarithmic axis
_LINEAR_LENGTH = 1 / 0.9  # of matplotlib's symmetric logarithmic axis up to its linear threshold, in decades
_WIDTH_SHARE = 0.01  # of the axis: how far a quadrature node is spread


def spectrum_figure(spectrum: Spectrum, title: str = "") -> Figure:
    """The Ritz values as stems with their error bounds, and the density beside them if there is one.

    Args:
        spectrum: The spectrum.
        title: Shown above.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if spectrum.density is None:
        figure = _figure(6.4)
        axes = [figure.subplots()]
    else:
        figure = _figure(11.0)
        axes = list(figure.subplots(1, 2))
        _draw_density(axes[1], spectrum.density)
    _draw_stems(axes[0], spectrum)
    if title:
        figure.suptitle(title)
    return figure


def density_figure(density: SpectralDensity, title: str = "") -> Figure:
    """The spectral density with its standard error.

    Args:
        density: The density.
        title: Shown above.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(6.4)
    _draw_density(figure.subplots(), density)
    if title:
        figure.suptitle(title)
    return figure


def index_figure(steps: Sequence[int], spectra: Sequence[Spectrum]) -> Figure:
    """Loss against index, one point for each spectrum of a run: the plane of Figure 1 of the paper.

    Args:
        steps: The optimizer step of each spectrum.
        spectra: The spectra.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(6.4)
    axes = figure.subplots()
    index = [spectrum.negative_fraction for spectrum in spectra]
    loss = [spectrum.loss for spectrum in spectra]
    axes.plot(index, loss, color="0.8", linewidth=1, zorder=1)
    points = axes.scatter(index, loss, c=list(steps), cmap="viridis", zorder=2)
    figure.colorbar(points, ax=axes, label="optimizer step")
    axes.set_xlabel("index: share of negative Ritz values")
    axes.set_ylabel("loss on the probe batches")
    axes.set_title(f"Index against loss up to step {steps[-1]}")
    axes.set_xlim(-0.03, max(0.5, 1.1 * max(index)) + 0.03)
    axes.grid(alpha=0.3)
    return figure


def _figure(width: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Drawing a spectrum needs matplotlib, which is not installed: pip install "lightning-sfn[plot]".'
        ) from error
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # loggers render the canvas; without pyplot nothing has to be closed
    return figure


def _draw_stems(axes: Axes, spectrum: Spectrum) -> None:
    values, residuals = spectrum.eigenvalues, spectrum.residuals
    places = torch.arange(1, len(values) + 1, device="cpu")
    for sign, colour in ((values < 0, _NEGATIVE), (values >= 0, _POSITIVE)):
        if bool(sign.any()):
            x, y, error = places[sign].tolist(), values[sign].tolist(), residuals[sign].tolist()
            axes.vlines(x, 0.0, y, colors=colour, linewidth=1)
            axes.errorbar(x, y, yerr=error, fmt="o", color=colour, ecolor="0.5", markersize=4, capsize=2)
    axes.axhline(0.0, color="0.3", linewidth=0.8)
    unit = _linear_part(values)
    axes.set_yscale("symlog", linthresh=unit)
    # In this order the NaN of an empty spectrum is passed over.
    axes.set_ylim(2 * min(-unit, spectrum.lambda_min), 2 * max(unit, spectrum.lambda_max))
    axes.set_xlabel("Ritz value, in ascending order")
    axes.set_ylabel("eigenvalue (loss per squared unit of the parameters)")
    axes.set_title(f"{len(values)} Ritz values with their residuals")
    axes.grid(alpha=0.3)


def _draw_density(axes: Axes, density: SpectralDensity) -> None:
    """Spreads the quadrature over a symmetric logarithmic axis, so that bulk and outliers are seen side by side."""
    unit = _linear_part(density.nodes)
    nodes = SpectralDensity(_symlog(density.nodes, unit), density.weights, density.size, density.products)
    low, high = float(nodes.nodes.min()), float(nodes.nodes.max())
    width = _WIDTH_SHARE * max(high - low, 1.0)
    points = torch.linspace(low - 4 * width, high + 4 * width, _GRID_POINTS, dtype=torch.float64, device="cpu")
    mean, error = nodes.on(points, width)
    least = 0.1 * width / density.size  # a tenth of what one eigenvalue contributes at its peak
    shown = _inverse_symlog(points, unit).tolist()
    if not math.isnan(float(error[0])):
        lower, upper = (mean - error).clamp_min(least).tolist(), (mean + error).clamp_min(least).tolist()
        axes.fill_between(shown, lower, upper, color=_BAND, label="standard error over the probes")
        axes.legend(loc="upper right", fontsize="small")
    axes.plot(shown, torch.where(mean < least, math.nan, mean).tolist(), color=_POSITIVE, linewidth=1.2)
    axes.set_ylim(least, 20 * float(mean.max()))  # room for the legend
    axes.axvline(0.0, color="0.3", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=unit)
    axes.tick_params(axis="x", labelrotation=45, labelsize="small")
    axes.set_yscale("log")
    axes.set_xlabel("eigenvalue (loss per squared unit of the parameters)")
    axes.set_ylabel("share of the eigenvalues (per unit of the axis)")
    axes.set_title(f"Spectral density, {len(density.nodes)} probes of {density.nodes.shape[1]} vectors")
    axes.grid(alpha=0.3)


def _linear_part(values: Tensor) -> float:
    """Up to this size eigenvalues are drawn on a linear axis: a power of ten, so that it is a tick."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return 10.0 ** math.floor(math.log10(_LINEAR_SHARE * largest)) if largest > 0 else 1.0


def _symlog(values: Tensor, unit: float) -> Tensor:
    """Places on matplotlib's symmetric logarithmic axis: linear up to the unit, decades of length 1 beyond."""
    beyond = _LINEAR_LENGTH + torch.log10((values.abs() / unit).clamp_min(1.0))
    return torch.where(values.abs() <= unit, _LINEAR_LENGTH * values / unit, values.sign() * beyond)


def _inverse_symlog(places: Tensor, unit: float) -> Tensor:
    beyond = places.sign() * torch.pow(10.0, places.abs() - _LINEAR_LENGTH)
    return unit * torch.where(places.abs() <= _LINEAR_LENGTH, places / _LINEAR_LENGTH, beyond)
