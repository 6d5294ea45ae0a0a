"""The embedded rows are the first rows of MNIST, unchanged, and small."""

from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Image

from lightning_sfn.data import sample_folder
from lightning_sfn.experiments.sources import load_split

ROWS = {"train": 5000, "test": 1000}
FULL_MNIST = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "mnist"


@pytest.mark.parametrize("split", ROWS)
def test_row_counts_and_features(split: str) -> None:
    rows = load_split("sample", split)
    assert len(rows) == ROWS[split]
    assert rows.features == {"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}


def test_stays_under_two_megabytes_and_states_its_licence() -> None:
    assert sum(file.stat().st_size for file in sample_folder().iterdir()) < 2_000_000
    readme = (sample_folder() / "README.md").read_text()
    for words in ("Yann LeCun and Corinna Cortes", "CC BY-SA 3.0", "rows 0 to 4,999", "rows 0 to 999"):
        assert words in readme


def test_labels_begin_as_in_the_published_files() -> None:
    assert load_split("sample", "train")[:10]["label"] == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert load_split("sample", "test")[:10]["label"] == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


@pytest.mark.parametrize("split", ROWS)
def test_images_equal_the_full_dataset(split: str) -> None:
    if not FULL_MNIST.is_dir():
        pytest.skip("the full MNIST files are not beside the checkout")
    sample = load_split("sample", split)
    full = load_split(FULL_MNIST, split).select(range(ROWS[split]))
    assert sample[:]["label"] == full[:]["label"]
    for ours, theirs in zip(sample[:]["image"], full[:]["image"], strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
