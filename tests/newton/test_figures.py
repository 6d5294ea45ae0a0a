"""Figures hold what they are to show, and explain their axes."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sfn.newton import Spectrum
from lightning_sfn.newton.density import SpectralDensity, spectral_density

from .cases import with_spectrum

pytest.importorskip("matplotlib", reason="figures need matplotlib, which is not installed")
from matplotlib.colors import to_rgba
from matplotlib.scale import SymmetricalLogTransform

from lightning_sfn.newton.figures import (
    _BAND,
    _NEGATIVE,
    _POSITIVE,
    _inverse_symlog,
    _linear_part,
    _symlog,
    density_figure,
    index_figure,
    spectrum_figure,
)

EIGENVALUE = "eigenvalue (loss per squared unit of the parameters)"


def spectrum_with(values: list[float], density: SpectralDensity | None = None, loss: float = 1.0) -> Spectrum:
    ritz = torch.tensor(values, dtype=torch.float64)
    return Spectrum(ritz, 0.1 * torch.arange(1.0, len(values) + 1.0).double(), loss, 0.1, len(values), density=density)


def density_with(values: list[float], probes: int) -> SpectralDensity:
    matrix = with_spectrum(torch.tensor(values, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    density = spectral_density(lambda v: matrix @ v, matrix[0], len(values), probes, generator=generator)
    assert density is not None
    return density


def words_of(axes: Any) -> tuple[str, str, str]:
    return axes.get_title(), axes.get_xlabel(), axes.get_ylabel()


def rendered_pixels(figure: Any) -> int:
    """Pixels that are not white."""
    figure.canvas.draw()
    return int((np.asarray(figure.canvas.buffer_rgba())[..., :3] < 255).any(-1).sum())


@pytest.mark.parametrize(
    "values",
    [[-3.0, -1e-6, 0.0, 2.0, 500.0], [-3.0, -2.0], [1.0, 2.0, 3.0], [0.0, 0.0], [7.0], [-1e-30], []],
    ids=str,
)
def test_every_ritz_value_is_a_stem_with_its_error_bound(values: list[float]) -> None:
    figure = spectrum_with(values).plot()
    (axes,) = figure.axes
    assert words_of(axes) == (
        f"{len(values)} Ritz values with their residuals",
        "Ritz value, in ascending order",
        EIGENVALUE,
    )
    points = [xy for container in axes.containers for xy in container[0].get_xydata().tolist()]
    assert sorted(points) == [[place + 1, value] for place, value in enumerate(values)]
    assert {(c[0].get_marker(), c[0].get_linestyle()) for c in axes.containers} <= {("o", "None")}
    segments = [
        segment.tolist() for lines in axes.collections for segment in lines.get_segments() if 0.0 in segment[:, 1]
    ]
    assert all([[place + 1, 0.0], [place + 1, value]] in segments for place, value in enumerate(values))
    bars = [segment for c in axes.containers for segment in c[2][0].get_segments()]
    heights = sorted(float(bar[1, 1] - bar[0, 1]) for bar in bars)
    largest = max(map(abs, values), default=0.0)
    assert heights == pytest.approx([0.2 * (place + 1) for place in range(len(values))], abs=1e-6 * largest)
    assert axes.get_yscale() == "symlog"
    unit = axes.yaxis.get_transform().linthresh
    assert unit == pytest.approx(_linear_part(torch.tensor(values)))
    low, high = min([-unit, *values]), max([unit, *values])
    assert axes.get_ylim() == pytest.approx((2 * low, 2 * high))  # half a tick's room
    (zero,) = (line for line in axes.lines if list(line.get_xdata()) == [0, 1])
    assert list(zero.get_ydata()) == [0, 0]
    assert tuple(figure.get_size_inches()) == (6.4, 4.2)
    assert rendered_pixels(figure) > 1000


@pytest.mark.parametrize(
    ("values", "unit"),
    [([], 1.0), ([0.0], 1.0), ([1e4], 1.0), ([-1.5e4, 3.0], 1.0), ([0.5], 1e-5), ([2e-3], 1e-7), ([9.9e7], 1e3)],
    ids=str,
)
def test_the_linear_part_is_a_ten_thousandth_of_the_largest_value_rounded_down(
    values: list[float], unit: float
) -> None:
    assert _linear_part(torch.tensor(values, dtype=torch.float64)) == pytest.approx(unit)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 100.0])
def test_places_on_the_axis_are_those_of_matplotlib(unit: float) -> None:
    shares = torch.tensor([-1e4, -30.0, -1.0, -0.2, 0.0, 1e-3, 0.7, 1.0, 1.5, 10.0, 1e5], dtype=torch.float64)
    values = unit * shares
    expected = SymmetricalLogTransform(10, unit, 1).transform(values.numpy()) / unit
    torch.testing.assert_close(_symlog(values, unit), torch.as_tensor(expected))
    torch.testing.assert_close(_inverse_symlog(torch.as_tensor(expected), unit), values)


def test_negative_and_positive_values_differ_in_colour() -> None:
    (axes,) = spectrum_with([-3.0, 2.0]).plot().axes
    assert [container[0].get_color() for container in axes.containers] == [_NEGATIVE, _POSITIVE]
    stems = {tuple(lines.get_color()[0]) for lines in axes.collections if 0.0 in lines.get_segments()[0][:, 1]}
    assert stems == {to_rgba(_NEGATIVE), to_rgba(_POSITIVE)}
    assert _NEGATIVE != _POSITIVE


@pytest.mark.parametrize(
    ("values", "probes"),
    [([-1.0, 0.0, 0.5, 300.0], 3), ([1.0, 2.0], 1), ([-2.0, -1.0], 3), ([0.0, 0.0], 1), ([4.0], 2)],
    ids=str,
)
def test_a_density_is_drawn_beside_the_stems(values: list[float], probes: int) -> None:
    figure = spectrum_with(values, density_with(values, probes)).plot()
    stems, density = figure.axes
    assert stems.get_title() == f"{len(values)} Ritz values with their residuals"
    drawn = density_with(values, probes)
    assert words_of(density) == (
        f"Spectral density, {probes} probes of {drawn.nodes.shape[1]} vectors",
        EIGENVALUE,
        "share of the eigenvalues (per unit of the axis)",
    )
    assert tuple(figure.get_size_inches()) == (11.0, 4.2)
    assert figure.get_constrained_layout()  # words do not lie on words
    assert stems.get_position().x1 < density.get_position().x0
    assert (density.get_xscale(), density.get_yscale()) == ("symlog", "log")
    (zero,) = (line for line in density.lines if list(line.get_ydata()) == [0, 1])
    assert list(zero.get_xdata()) == [0, 0]
    assert bool(density.get_legend()) == (probes > 1)  # one probe has no error band
    assert rendered_pixels(figure) > 1000


def test_the_drawn_density_integrates_to_one_and_peaks_at_the_eigenvalues() -> None:
    """Per unit of the axis, which is logarithmic: one peak for each eigenvalue, of equal areas."""
    density = density_with([-1.0, 1.0, 100.0], 200)
    (axes,) = density_figure(density).axes
    curve = max((line.get_xydata() for line in axes.lines), key=len)
    shown = torch.as_tensor(curve[~torch.tensor(curve).isnan().any(1).numpy()])
    axis = axes.xaxis.get_transform()
    places = torch.as_tensor(axis.transform(shown[:, 0].numpy().copy())) / axis.linthresh
    for peak in (-1.0, 1.0, 100.0):
        near = (shown[:, 0] / peak > 1 / 3) & (shown[:, 0] / peak < 3)
        assert float(shown[near, 1].max()) > 100 * float(shown[:, 1].min())
        area = torch.trapezoid(shown[near, 1], places[near])
        assert float(area) == pytest.approx(1 / 3, rel=0.1)


def test_the_band_is_as_wide_as_the_standard_error_and_everything_is_in_sight() -> None:
    density = density_with([-1.0, 1.0, 100.0], 3)
    figure = density_figure(density)
    assert tuple(figure.get_size_inches()) == (6.4, 4.2)
    (axes,) = figure.axes
    assert axes.get_legend().get_texts()[0].get_text() == "standard error over the probes"
    curve = max((line.get_xydata() for line in axes.lines), key=len)
    assert len(curve) == 800
    least, most = axes.get_ylim()
    nodes = _symlog(density.nodes, _linear_part(density.nodes))
    width = 0.01 * float(nodes.max() - nodes.min())
    assert least == pytest.approx(0.1 * width / density.size)
    assert most == pytest.approx(20 * float(np.nanmax(curve[:, 1])))
    shown = _symlog(torch.as_tensor(curve[:, 0].copy()), _linear_part(density.nodes))
    assert [float(shown[0]), float(shown[-1])] == pytest.approx(
        [float(nodes.min()) - 4 * width, float(nodes.max()) + 4 * width]
    )
    assert float(np.nanmin(curve[:, 1])) >= least  # what is below is left out
    (band,) = axes.collections
    assert tuple(band.get_facecolor()[0]) == to_rgba(_BAND)
    assert max(axes.lines, key=lambda line: len(line.get_xdata())).get_color() == _POSITIVE
    outline = band.get_paths()[0].vertices
    places = SpectralDensity(nodes, density.weights, density.size, density.products)
    mean, error = places.on(shown, width)
    for index in (int(mean.argmax()), int((mean - 1.0).abs().argmin())):
        heights = outline[np.isclose(outline[:, 0], curve[index, 0], rtol=1e-9, atol=1e-15), 1]
        expected = [max(float(mean[index] + sign * error[index]), least) for sign in (-1, 1)]
        assert [heights.min(), heights.max()] == pytest.approx(expected)
    assert float(outline[:, 1].min()) >= 0.999 * least


def test_a_narrow_spectrum_is_spread_over_a_hundredth_of_a_decade() -> None:
    (axes,) = density_figure(density_with([4.0, 4.0], 2)).axes
    curve = max((line.get_xydata() for line in axes.lines), key=len)
    assert float(np.nanmax(curve[:, 1])) == pytest.approx(1 / (0.01 * (2 * np.pi) ** 0.5), rel=0.01)


def test_titles_are_shown_above() -> None:
    density = density_with([1.0, 2.0], 2)
    assert spectrum_figure(spectrum_with([1.0]), "Step 7").get_suptitle() == "Step 7"
    assert density_figure(density, "Step 8").get_suptitle() == "Step 8"
    assert density_figure(density).get_suptitle() == spectrum_figure(spectrum_with([1.0])).get_suptitle() == ""


def points_of(axes: Any) -> Any:
    (points,) = axes.collections
    return points


@pytest.mark.parametrize(
    ("values", "right"), [([1.0, 2.0, 3.0, 4.0], 0.53), ([-1.0, 2.0], 0.58), ([-2.0, -1.0], 1.13)], ids=str
)
def test_indices_up_to_a_half_are_in_sight_and_those_that_are_larger(values: list[float], right: float) -> None:
    axes, _ = index_figure([1], [spectrum_with(values)]).axes
    assert axes.get_xlim() == pytest.approx((-0.03, right))


def test_the_index_figure_has_one_point_for_each_spectrum() -> None:
    spectra = [spectrum_with([-3.0, -2.0, 1.0, 2.0], loss=2.0), spectrum_with([-3.0, 1.0, 2.0, 4.0], loss=1.5)]
    figure = index_figure([10, 20], spectra)
    axes, colours = figure.axes
    assert words_of(axes) == (
        "Index against loss up to step 20",
        "index: share of negative Ritz values",
        "loss on the probe batches",
    )
    assert tuple(figure.get_size_inches()) == (6.4, 4.2)
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[0.5, 2.0], [0.25, 1.5]]
    assert line.get_zorder() < points_of(axes).get_zorder()
    assert colours.get_ylabel() == "optimizer step"
    assert colours.get_ylim() == (10, 20)
    points = points_of(axes)
    assert points.get_offsets().tolist() == [[0.5, 2.0], [0.25, 1.5]]
    assert points.get_array().tolist() == [10, 20]
    assert rendered_pixels(figure) > 1000


def test_one_spectrum_is_an_index_figure_already() -> None:
    assert rendered_pixels(index_figure([0], [spectrum_with([1.0])])) > 1000


def test_a_figure_can_be_written(tmp_path: Path) -> None:
    spectrum_with([-1.0, 1.0]).plot().savefig(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_pyplot_is_left_alone() -> None:
    """So that nothing has to be closed, and no backend is chosen."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    spectrum_with([1.0]).plot()
    assert pyplot.get_fignums() == before


def test_without_matplotlib_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sentence = 'Drawing a spectrum needs matplotlib, which is not installed: pip install "lightning-sfn[plot]".'
    with pytest.raises(ImportError, match="^" + re.escape(sentence) + "$"):
        spectrum_with([1.0]).plot()
