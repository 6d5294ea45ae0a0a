"""Figures hold what they are to show, and explain their axes."""

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
from lightning_sfn.newton.figures import density_figure, index_figure, spectrum_figure


def spectrum_with(values: list[float], density: SpectralDensity | None = None, loss: float = 1.0) -> Spectrum:
    ritz = torch.tensor(values, dtype=torch.float64)
    return Spectrum(ritz, 0.1 * torch.arange(1.0, len(values) + 1.0).double(), loss, 0.1, len(values), density=density)


def density_with(values: list[float], probes: int) -> SpectralDensity:
    matrix = with_spectrum(torch.tensor(values, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    density = spectral_density(lambda v: matrix @ v, matrix[0], len(values), probes, generator=generator)
    assert density is not None
    return density


def assert_explained(axes: Any) -> None:
    assert axes.get_title()
    assert axes.get_xlabel()
    assert axes.get_ylabel()


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
    assert_explained(axes)
    assert str(len(values)) in axes.get_title()
    points = [xy for container in axes.containers for xy in container[0].get_xydata().tolist()]
    assert sorted(points) == [[place + 1, value] for place, value in enumerate(values)]
    segments = [
        segment.tolist() for lines in axes.collections for segment in lines.get_segments() if 0.0 in segment[:, 1]
    ]
    assert all([[place + 1, 0.0], [place + 1, value]] in segments for place, value in enumerate(values))
    bars = [segment for c in axes.containers for segment in c[2][0].get_segments()]
    heights = sorted(float(bar[1, 1] - bar[0, 1]) for bar in bars)
    largest = max(map(abs, values), default=0.0)
    assert heights == pytest.approx([0.2 * (place + 1) for place in range(len(values))], abs=1e-6 * largest)
    assert axes.get_yscale() == "symlog"
    assert rendered_pixels(figure) > 1000


def test_negative_and_positive_values_differ_in_colour() -> None:
    (axes,) = spectrum_with([-3.0, 2.0]).plot().axes
    colours = [container[0].get_color() for container in axes.containers]
    assert len(set(colours)) == 2


@pytest.mark.parametrize(
    ("values", "probes"),
    [([-1.0, 0.0, 0.5, 300.0], 3), ([1.0, 2.0], 1), ([-2.0, -1.0], 3), ([0.0, 0.0], 1), ([4.0], 2)],
    ids=str,
)
def test_a_density_is_drawn_beside_the_stems(values: list[float], probes: int) -> None:
    figure = spectrum_with(values, density_with(values, probes)).plot()
    stems, density = figure.axes
    assert_explained(stems)
    assert_explained(density)
    assert str(probes) in density.get_title()
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


def test_titles_are_shown_above() -> None:
    density = density_with([1.0, 2.0], 2)
    assert spectrum_figure(spectrum_with([1.0]), "Step 7").get_suptitle() == "Step 7"
    assert density_figure(density, "Step 8").get_suptitle() == "Step 8"
    assert density_figure(density).get_suptitle() == ""


def test_the_index_figure_has_one_point_for_each_spectrum() -> None:
    spectra = [spectrum_with([-3.0, -2.0, 1.0, 2.0], loss=2.0), spectrum_with([-3.0, 1.0, 2.0, 4.0], loss=1.5)]
    figure = index_figure([10, 20], spectra)
    axes, colours = figure.axes
    assert_explained(axes)
    assert "20" in axes.get_title()
    assert colours.get_ylabel() == "optimizer step"
    (points,) = axes.collections
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
    sentence = r'^Drawing a spectrum needs matplotlib.*pip install "lightning-sfn\[plot\]"\.$'
    with pytest.raises(ImportError, match=sentence):
        spectrum_with([1.0]).plot()
