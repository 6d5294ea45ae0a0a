"""Images: parquet files, tensor files, sizes, and what is said where something is missing."""

import sys
from pathlib import Path

import pytest
import torch
from paper_scale.images import load_images, prepare

from lightning_sfn.experiments.mnist import MNISTDataModule


def test_prepared_tensors_are_the_parquet_images(tmp_path: Path) -> None:
    prepare("sample", tmp_path / "mnist.pt")
    images = load_images(str(tmp_path / "mnist.pt"))
    assert (images["train"].shape, images["test"].shape) == ((5000, 784), (1000, 784))
    data = MNISTDataModule("sample", image_size=28)
    data.setup()
    for split, loader in (("train", data.train_dataloader()), ("test", data.test_dataloader())):
        assert torch.equal(images[split], loader.dataset.pixels)
    smaller = load_images(str(tmp_path / "mnist.pt"), side=14, cases=7)
    blocks = images["test"][:7].view(7, 14, 2, 14, 2).float().mean(dim=(2, 4)).round().to(torch.uint8)
    assert torch.equal(smaller["test"], blocks.flatten(1))


def test_without_pyarrow_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow and pillow.*'prepare'.*--data"):
        load_images("sample")


@pytest.mark.parametrize("content", [b"hello", None])
def test_other_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mnist.pt"
    if content is None:
        torch.save({"train": torch.zeros(3, 784), "test": torch.zeros(3, 784)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold 'train' and 'test' as uint8"):
        load_images(str(path))


def test_missing_data_and_odd_sides(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no file train\*\.parquet"):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match="a divisor of 28"):
        load_images("sample", side=10)
