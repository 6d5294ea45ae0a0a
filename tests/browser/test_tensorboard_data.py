"""A TensorBoard server over the folder of a run gives out the spectra that the callback took."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lightning_sfn import HessianSpectrum
from lightning_sfn.newton.figures import density_figure, index_figure, spectrum_figure

from .conftest import EPOCHS, RUN, TensorBoard

History = list[tuple[int, Any]]
SIGNED_LOG_UNIT = 1e-4
ENDS = [f"{side}_{place:02d}" for side in ("smallest", "largest") for place in range(3)]
NUMBERS = ("lambda_min", "lambda_max", "negative_fraction", "gradient_norm", "residual_max", "loss", "products")
PICTURES = {"hessian/ritz_values", "hessian/index_against_loss", "hessian/density"}


def counted(buckets: list[list[float]]) -> np.ndarray:
    """The filled buckets of a histogram, as rows of left edge, right edge and count."""
    return np.array([bucket for bucket in buckets if bucket[2] > 0])


def test_the_run_has_the_tags_of_the_documentation(tensorboard: TensorBoard) -> None:
    assert json.loads(tensorboard.get("data/runs")) == [RUN]
    scalars = {f"hessian/{name}" for name in (*NUMBERS, "converged")}
    scalars |= {f"hessian/density_negative_fraction{suffix}" for suffix in ("", "_error")}
    scalars |= {f"hessian/{kind}/{end}" for kind in ("eigenvalue", "residual") for end in ENDS}
    assert {tag for tag in tensorboard.tags("scalars") if tag.startswith("hessian")} == scalars
    assert tensorboard.tags("histograms") == {"hessian/eigenvalues", "hessian/eigenvalues_signed_log"}
    assert tensorboard.tags("images") == PICTURES


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_of_the_spectra(name: str, tensorboard: TensorBoard, history: History) -> None:
    points = tensorboard.points("scalars", f"hessian/{name}")
    assert [step for _, step, _ in points] == [step for step, _ in history]
    expected = [getattr(spectrum, name) for _, spectrum in history]
    assert [value for _, _, value in points] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("end", ENDS)
def test_eigenvalues_at_both_ends_are_those_of_the_spectra(
    end: str, tensorboard: TensorBoard, history: History
) -> None:
    side, place = end.split("_")
    expected = [spectrum.eigenvalues[int(place) if side == "smallest" else -1 - int(place)] for _, spectrum in history]
    points = tensorboard.points("scalars", f"hessian/eigenvalue/{end}")
    assert [value for _, _, value in points] == pytest.approx([float(value) for value in expected], rel=1e-6)
    bounds = [value for _, _, value in tensorboard.points("scalars", f"hessian/residual/{end}")]
    assert len(bounds) == EPOCHS
    assert min(bounds) >= 0


@pytest.mark.parametrize("tag", ["hessian/eigenvalues", "hessian/eigenvalues_signed_log"])
def test_histograms_hold_every_value_negative_ones_too(tag: str, tensorboard: TensorBoard, history: History) -> None:
    points = tensorboard.points("histograms", tag)
    assert [step for _, step, _ in points] == [step for step, _ in history]
    for (_, _, buckets), (_, spectrum) in zip(points, history, strict=True):
        values = spectrum.eigenvalues
        if tag.endswith("signed_log"):
            values = values.sign() * torch.log10(1 + values.abs() / SIGNED_LOG_UNIT)
        left, right, count = counted(buckets).T
        for value in values.tolist():
            assert ((left <= value + 1e-6) & (value <= right + 1e-6)).any(), f"{value} is in no bucket"
        assert count.sum() == len(values)
        negative = count[right <= 0].sum()
        assert negative == int((values < 0).sum())
        assert negative > 0


@pytest.mark.parametrize("tag", sorted(PICTURES))
def test_pictures_are_the_figures_of_the_spectra(
    tag: str, tensorboard: TensorBoard, history: History, logged: tuple[Path, HessianSpectrum]
) -> None:
    """One for each spectrum, and the last one is pixel by pixel the figure of the last spectrum."""
    points = tensorboard.points("images", tag, sample=0)
    assert [point["step"] for point in points] == [step for step, _ in history]
    pictures = [tensorboard.get(f"data/plugin/images/individualImage?{point['query']}&") for point in points]
    assert len(set(pictures)) == EPOCHS
    with Image.open(io.BytesIO(pictures[-1])) as picture:
        assert picture.format == "PNG"
        shown = np.asarray(picture.convert("RGB"))
    assert shown.shape[0] >= 400
    assert shown.shape[1] >= 600
    np.testing.assert_array_equal(shown, drawn(tag, logged[1]))


def drawn(tag: str, callback: HessianSpectrum) -> np.ndarray:
    """The figure of a run's end, as red, green and blue."""
    steps, spectra = zip(*callback.history, strict=True)
    title = f"Step {steps[-1]}"
    figure: Figure = {
        "hessian/ritz_values": lambda: spectrum_figure(replace(spectra[-1], density=None), title),
        "hessian/index_against_loss": lambda: index_figure(steps, spectra),
        "hessian/density": lambda: density_figure(spectra[-1].density, title),
    }[tag]()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))
