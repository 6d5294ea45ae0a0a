"""Labelled images, shrunk as in Section 7.1.1: MNIST and CIFAR-10 as flat grey rows with their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_sfn.experiments.mnist import MNIST, ImageKind, as_it_is, decode_images
from lightning_sfn.experiments.sources import SAMPLE, is_hub_id, load_split

__all__ = ["HUB_IDS", "ClassifiedImages", "labelled_images"]

DatasetName = Literal["mnist", "cifar10"]

KINDS = {"mnist": MNIST, "cifar10": ImageKind("ClassifiedImages", "img", 32, "RGB")}
"""What the images look like, by data set."""

HUB_IDS = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
"""Where the Hugging Face Hub has them."""

_LABEL = "label"


def labelled_images(
    dataset: str, source: str, split: str = "train", *, image_size: int = 10, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Load one split of labelled images, grey and shrunk by area averaging.

    Args:
        dataset: ``"mnist"`` or ``"cifar10"``.
        source: ``"sample"`` (MNIST alone), a path, or a Hub id, as in `load_split`.
        split: ``"train"`` or ``"test"``.
        image_size: Height and width in pixels of the result.
        limit: How many rows to take from the front; all if None.

    Returns:
        Pixels, float32 in [0, 1] or uint8 of the full size, of shape (N, image_size**2); and classes, int64 of shape
        (N,).

    Raises:
        MisconfigurationException: If the source does not deliver such images.
    """
    if dataset not in KINDS:
        raise MisconfigurationException(f"The data set is {dataset!r}, but one of {', '.join(KINDS)} is expected.")
    if source == SAMPLE and dataset != "mnist":
        raise MisconfigurationException(
            f"There is no embedded sample of {dataset}: give a folder of parquet files, or the Hub id "
            f"{HUB_IDS[dataset]!r}."
        )
    kind = KINDS[dataset]
    rows = load_split(source, split, [kind.column, _LABEL])
    if len(rows) == 0:
        raise MisconfigurationException(f"The data source {source!r} has no rows in its split {split!r}.")
    rows = rows.select(range(min(limit, len(rows)))) if limit is not None else rows
    return decode_images(rows, image_size, source, kind), torch.tensor(rows[_LABEL][:], dtype=torch.int64)


class LabelledRows(Dataset[tuple[Tensor, Tensor]]):
    """Images and classes, of which a whole batch is taken by one index operation.

    Args:
        pixels: As `labelled_images` gives them.
        labels: Likewise.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one image, float32 of shape (pixels,) in [0, 1], and its class."""
        pixels, labels = self.__getitems__([index])
        return pixels[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: float32 of shape (len(indices), pixels), and int64 of shape (len(indices),)."""
        rows = torch.as_tensor(indices)
        pixels = self.pixels[rows]
        return (pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels), self.labels[rows]


class ClassifiedImages(pl.LightningDataModule):
    """Labelled images for a classifier; a batch is a pair of float32 pixels and int64 classes.

    Images are turned grey, decoded once, shrunk by area averaging (Pillow's ``BOX`` filter) and kept as one tensor.

    Args:
        dataset: ``"mnist"`` or ``"cifar10"``.
        source: ``"sample"`` (MNIST alone), a folder or parquet file with the columns of the Hub data set, or a Hub id.
        image_size: Height and width in pixels after shrinking, at most those of the images.
        batch_size: Images per batch, at least 1.
        limit: How many training images to take; all if None.

    Raises:
        MisconfigurationException: If an argument is out of range, or, in `setup`, if the source does not deliver such
            images.
    """

    def __init__(
        self,
        dataset: DatasetName = "mnist",
        source: str | Path = SAMPLE,
        image_size: int = 10,
        batch_size: int = 100,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if dataset not in KINDS:
            raise MisconfigurationException(f"ClassifiedImages got dataset={dataset!r}, not one of {', '.join(KINDS)}.")
        if not 1 <= image_size <= KINDS[dataset].side:
            raise MisconfigurationException(
                f"ClassifiedImages got image_size={image_size}, but 1 to {KINDS[dataset].side} is expected."
            )
        if batch_size < 1 or (limit is not None and limit < 1):
            raise MisconfigurationException(
                f"ClassifiedImages got batch_size={batch_size} and limit={limit}, but both must be at least 1."
            )
        self.dataset, self.source = dataset, str(source)
        self.image_size, self.batch_size, self.limit = image_size, batch_size, limit
        self._rows: dict[str, LabelledRows] = {}

    def prepare_data(self) -> None:
        """Fetch a Hub data set once, on one process, before the others read it from the cache."""
        if is_hub_id(self.source):
            load_split(self.source, "train", [KINDS[self.dataset].column, _LABEL])

    def setup(self, stage: str | None = None) -> None:
        """Decode and shrink the images of the splits that a stage needs, once.

        Args:
            stage: ``"fit"`` for both splits, another stage for the ``test`` split alone, None for both.
        """
        for split in ("train", "test") if stage in (None, "fit") else ("test",):
            if split not in self._rows:
                limit = self.limit if split == "train" else None
                self._rows[split] = LabelledRows(
                    *labelled_images(self.dataset, self.source, split, image_size=self.image_size, limit=limit)
                )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the shuffled loader of the ``train`` split."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the ``test`` split, in order."""
        return self._loader("test", shuffle=False)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the ``test`` split, in order."""
        return self._loader("test", shuffle=False)

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self._rows[split], self.batch_size, shuffle=shuffle, collate_fn=as_it_is)
