"""What a person sees of a run's spectra in TensorBoard's pages: cards, numbers, drawn histograms and pictures."""

import io
import json
import re
import time
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from .chromium import PATIENCE, Chromium
from .conftest import EPOCHS, TensorBoard

History = list[tuple[int, Any]]
PICTURES = ["hessian/density", "hessian/index_against_loss", "hessian/ritz_values"]
HISTOGRAMS = ["hessian/eigenvalues", "hessian/eigenvalues_signed_log"]
WIDTH, HEIGHT = 640, 420  # of the pictures, in pixels
NUMBERS = ["gradient_norm", "lambda_max", "lambda_min", "loss", "negative_fraction"]
TITLE = "card.querySelector('tb-truncated-path').title"


def open_cards(chromium: Chromium, tensorboard: TensorBoard, tags: list[str]) -> None:
    """The first page of TensorBoard, with the cards of these tags and without smoothing."""
    pattern = quote(f"^({'|'.join(tags)})$")
    chromium.go(f"{tensorboard.url}?tagFilter={pattern}&smoothing=0#timeseries")


def wait_until_drawn(chromium: Chromium, elements: str, cards: int) -> None:
    """Waits until the screen shows something coloured, not only text and frames, in each of so many elements."""
    deadline = time.monotonic() + PATIENCE
    counts: list[int] = []
    while len(counts) != cards or min(counts) < 100:
        assert time.monotonic() < deadline, f"{elements}: coloured pixels {counts}, but {cards} drawings are expected"
        boxes = chromium.ask(
            f"{elements}.map(node => node.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
        )
        with Image.open(io.BytesIO(chromium.screenshot())) as screen:
            crops = [np.asarray(screen.convert("RGB").crop(tuple(map(round, box))), dtype=int) for box in boxes]
        counts = [int((np.ptp(crop, axis=2) > 30).sum()) for crop in crops]


def outline(path: str) -> np.ndarray:
    """The corners of a path of straight lines, as rows of x and y."""
    return np.array([[float(number) for number in corner.split(",")] for corner in re.split("[ML]", path)[1:]])


def test_scalar_cards_show_the_last_spectrum(chromium: Chromium, tensorboard: TensorBoard, history: History) -> None:
    open_cards(chromium, tensorboard, [f"hessian/{name}" for name in NUMBERS])
    rows = f"deep('scalar-card').map(card => [{TITLE}, ...[...card.querySelectorAll('tb-data-table-content-cell')]"
    rows += ".map(cell => cell.innerText.trim()).filter(text => text)])"
    chromium.wait_for(f"{rows}.filter(row => row.length > 3).length == {len(NUMBERS)}", "a number on every card")
    step, spectrum = history[-1]
    shown = {row[0]: row[1:] for row in chromium.ask(rows)}
    assert list(shown) == [f"hessian/{name}" for name in NUMBERS]
    for name in NUMBERS:
        _, value, at, *_ = shown[f"hessian/{name}"]
        value = value.replace("\N{MINUS SIGN}", "-")
        assert float(value) == pytest.approx(getattr(spectrum, name), rel=0, abs=5.1e-5)  # four decimals are shown
        assert int(at) == step
    wait_until_drawn(chromium, "deep('scalar-card line-chart canvas')", len(NUMBERS))
    assert chromium.problems == []


def test_histogram_cards_show_the_share_of_negative_eigenvalues(
    chromium: Chromium, tensorboard: TensorBoard, history: History
) -> None:
    """In the signed logarithm nothing is close to zero here, so the areas beside it are the shares."""
    open_cards(chromium, tensorboard, HISTOGRAMS)
    cards = f"deep('histogram-card').map(card => [{TITLE}, [...card.querySelectorAll('tb-histogram path')]"
    cards += ".filter(path => path.getAttribute('stroke') != 'currentColor').map(path => path.getAttribute('d')),"
    cards += "[...card.querySelectorAll('tb-histogram g')].filter(g => g.textContent == '0')"
    cards += ".map(g => g.getAttribute('transform'))])"
    finished = f"{cards}.filter(card => card[1].length == {EPOCHS}).length == {len(HISTOGRAMS)}"
    chromium.wait_for(finished, "a path for every spectrum on every card")
    wait_until_drawn(chromium, "deep('histogram-card tb-histogram')", len(HISTOGRAMS))
    shown = {title: (paths, ticks) for title, paths, ticks in chromium.ask(cards)}
    assert list(shown) == HISTOGRAMS
    for paths, _ in shown.values():
        assert all(np.isfinite(outline(path)).all() and len(outline(path)) > 10 for path in paths)
    paths, ticks = shown["hessian/eigenvalues_signed_log"]
    zero = float(ticks[0].removeprefix("translate(").split(",")[0])
    for path, (_, spectrum) in zip(paths, history, strict=True):
        x, y = outline(path).T
        assert y[x < zero].sum() / y.sum() == pytest.approx(spectrum.negative_fraction, abs=1e-3)
    assert chromium.problems == []


def test_picture_cards_show_the_last_pictures(chromium: Chromium, tensorboard: TensorBoard, history: History) -> None:
    open_cards(chromium, tensorboard, PICTURES)
    cards = f"deep('image-card').map(card => [{TITLE}, card.innerText, card.querySelector('img')])"
    sizes = f"{cards}.map(([title, text, img]) => [title, text, img?.naturalWidth ?? 0, img?.naturalHeight ?? 0])"
    chromium.wait_for(f"{sizes}.filter(card => card[2] > 0).length == {len(PICTURES)}", "a picture on every card")
    shown = chromium.ask(sizes)
    assert [title for title, *_ in shown] == PICTURES
    for _, text, width, height in shown:
        assert f"Step {history[-1][0]}" in text
        assert (width, height) == (WIDTH, HEIGHT)
    wait_until_drawn(chromium, "deep('image-card img')", len(PICTURES))
    assert chromium.problems == []


@pytest.mark.parametrize(
    ("page", "card", "tags", "drawing"),
    [
        ("scalars", "tf-scalar-card", ["hessian/lambda_max", "hessian/lambda_min"], "vz-line-chart2"),
        ("histograms", "tf-histogram-loader", HISTOGRAMS, "vz-histogram-timeseries"),
        ("images", "tf-image-loader", PICTURES, "img"),
    ],
)
def test_each_kind_has_its_own_page(
    page: str, card: str, tags: list[str], drawing: str, chromium: Chromium, tensorboard: TensorBoard
) -> None:
    chromium.go(f"{tensorboard.url}#{page}")
    cards = f"deep('{card}').filter(card => {json.dumps(tags)}.includes(card.tag))"
    drawings = f"{cards}.flatMap(card => deep('{drawing}', card.shadowRoot ?? card))"
    chromium.wait_for(f"{drawings}.length == {len(tags)}", f"a drawing for each of {tags}")
    if page == "images":
        whole = f"{drawings}.every(img => img.naturalWidth == {WIDTH} && img.naturalHeight == {HEIGHT})"
        chromium.wait_for(whole, "every picture in its size")
    if page == "histograms":
        paths = "deep('path.outline').map(path => path.getAttribute('d'))"
        chromium.wait_for(f"{paths}.length == {EPOCHS * len(tags)}", "a path for every spectrum")
        assert all(np.isfinite(outline(path)).all() and len(outline(path)) > 10 for path in chromium.ask(paths))
    wait_until_drawn(chromium, drawings, len(tags))
    assert chromium.problems == []
