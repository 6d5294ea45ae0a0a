"""MNIST as the paper uses it: grey images, shrunk to 10x10, as flat rows of numbers in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_sfn.experiments.sources import is_hub_id, load_split

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

IMAGE_COLUMN = "image"
"""The column that holds the images, as in the hub dataset ``ylecun/mnist``."""

FULL_SIZE = 28
"""Height and width of an MNIST image in pixels."""

_DECODE_CHUNK = 1000


@dataclass(frozen=True)
class ImageKind:
    """What the images of a data set look like.

    Attributes:
        reader: Who reads them, for error messages.
        column: Column that holds them.
        side: Height and width in pixels.
        mode: Pillow's name of the pixel format.
    """

    reader: str
    column: str
    side: int
    mode: str


MNIST = ImageKind("MNISTDataModule", IMAGE_COLUMN, FULL_SIZE, "L")


class ImageRows(Dataset[Tensor]):
    """Flat images in one tensor, of which a whole batch is taken by one index operation.

    Args:
        pixels: Tensor of shape (N, pixels): float32 in [0, 1], or uint8 in 0..255, which is converted batch by batch.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        """Return one image, float32 of shape (pixels,) in [0, 1]."""
        return _as_unit_floats(self.pixels[index])

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Return a batch, float32 of shape (len(indices), pixels) in [0, 1]; `DataLoader` calls this by itself."""
        return _as_unit_floats(self.pixels[torch.as_tensor(indices)])


class MNISTDataModule(pl.LightningDataModule):
    """MNIST images for an autoencoder; a batch is one float32 tensor of shape (batch_size, image_size**2) in [0, 1].

    The images are decoded once, shrunk by area averaging (Pillow's ``BOX`` filter, 8-bit result) and kept as one
    tensor: float32 after shrinking, uint8 at the full size of 28, where floats would take 190 MB. Labels are dropped.
    The training loader shuffles; the validation loader serves the ``test`` split in order.

    Args:
        source: ``"sample"`` (5,000 training and 1,000 test images that travel with the package), a folder or parquet
            file with the columns of ``ylecun/mnist``, or a Hub id such as ``ylecun/mnist``.
        image_size: Height and width in pixels after shrinking, 1 to 28.
        batch_size: Images per batch, at least 1.
        num_workers: Loader processes; 0 is fastest, because fetching a batch is a single index operation.

    Raises:
        MisconfigurationException: If an argument is out of range, or, in `setup`, if the source does not deliver
            28x28 grey images.
    """

    def __init__(
        self, source: str | Path = "sample", image_size: int = 10, batch_size: int = 100, num_workers: int = 0
    ) -> None:
        super().__init__()
        _check_range("image_size", image_size, 1, FULL_SIZE)
        _check_range("batch_size", batch_size, 1, None)
        _check_range("num_workers", num_workers, 0, None)
        self.source = str(source)
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._rows: dict[str, ImageRows] = {}

    def prepare_data(self) -> None:
        """Fetch a Hub dataset once, on one process, before the others read it from the cache."""
        if is_hub_id(self.source):
            load_split(self.source, "train", [IMAGE_COLUMN])

    def setup(self, stage: str | None = None) -> None:
        """Decode and shrink the images of the splits that a stage needs, once.

        Args:
            stage: ``"fit"`` for both splits, another stage for the ``test`` split alone, None for both.
        """
        for split in ("train", "test") if stage in (None, "fit") else ("test",):
            if split not in self._rows:
                images = load_split(self.source, split, [IMAGE_COLUMN])
                self._rows[split] = ImageRows(decode_images(images, self.image_size, self.source))

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the shuffled loader of the ``train`` split."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the loader of the ``test`` split, in order."""
        return self._loader("test", shuffle=False)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return the loader of the ``test`` split, in order."""
        return self._loader("test", shuffle=False)

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Tensor]:
        return DataLoader(
            self._rows[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            persistent_workers=self.num_workers > 0,
        )


def decode_images(dataset: datasets.Dataset, image_size: int, source: str, kind: ImageKind = MNIST) -> Tensor:
    """Decode the image column of rows, turn colours into luminance, and shrink by area averaging.

    Args:
        dataset: Rows with a column of square images (``Image`` feature, or its stored form).
        image_size: Height and width in pixels of the result, at most those of the images.
        source: Name of the source, for the error message.
        kind: What the images must look like.

    Returns:
        Tensor of shape (N, image_size**2), row by row: float32 in [0, 1], or uint8 if the images keep their size.

    Raises:
        MisconfigurationException: If a row holds no image of that kind.
    """
    pixels = torch.empty(len(dataset), image_size * image_size, dtype=torch.uint8)
    images = _with_image_feature(dataset.select_columns([kind.column]), source, kind.column)
    for start in range(0, len(images), _DECODE_CHUNK):
        for offset, image in enumerate(images[start : start + _DECODE_CHUNK][kind.column]):
            pixels[start + offset] = _shrink(image, image_size, f"row {start + offset} of {source!r}", kind)
    return pixels if image_size == kind.side else _as_unit_floats(pixels)


def _with_image_feature(dataset: datasets.Dataset, source: str, column: str) -> datasets.Dataset:
    from datasets import Image

    if isinstance(dataset.features[column], Image):
        return dataset
    try:
        return dataset.cast_column(column, Image())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise MisconfigurationException(
            f"The column {column!r} of {source!r} has the type {dataset.features[column]}, but images are "
            "needed: store them as the Image feature of the datasets package."
        ) from error


def _shrink(image: object, image_size: int, where: str, kind: ImageKind) -> Tensor:
    from PIL import Image

    side = kind.side
    if not isinstance(image, Image.Image) or image.size != (side, side) or image.mode != kind.mode:
        found = f"{image.size} in mode {image.mode!r}" if isinstance(image, Image.Image) else type(image).__name__
        wanted = "grey" if kind.mode == "L" else "colour"
        raise MisconfigurationException(
            f"{kind.reader} reads {side}x{side} {wanted} images (mode {kind.mode!r}), but {where} is {found}: "
            "give a source with the images of that data set."
        )
    image = image.convert("L")
    if image_size != side:
        image = image.resize((image_size, image_size), Image.Resampling.BOX)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def _as_unit_floats(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels


def as_it_is(batch: T) -> T:
    """What `DataLoader` should do with a batch that `__getitems__` has made whole."""
    return batch


def _check_range(name: str, value: int, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"
        raise MisconfigurationException(f"MNISTDataModule got {name}={value!r}, but {name} must be {wanted}.")
