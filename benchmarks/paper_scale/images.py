"""MNIST as two uint8 tensors, from a prepared tensor file or from parquet files."""

import io
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sfn.data import sample_folder

__all__ = ["SIDE", "Images", "load_images", "prepare"]

SIDE = 28
"""Height and width of an MNIST image in pixels."""

Images = dict[str, Tensor]
"""``train`` and ``test``: uint8 of shape (N, side * side)."""

_SPLITS = ("train", "test")


def load_images(source: str, *, side: int = SIDE, cases: int | None = None) -> Images:
    """Load both splits.

    Args:
        source: A tensor file that `prepare` wrote, a folder with ``train*.parquet`` and ``test*.parquet`` (columns of
            ``ylecun/mnist``), or ``"sample"`` for the images that travel with the package.
        side: Height and width of the result, a divisor of 28; smaller images are averages, rounded to 8 bits.
        cases: Images to take from the front of each split; all if None.

    Returns:
        The images.

    Raises:
        ValueError: The source is neither, or what it needs to be read is not installed.
    """
    if SIDE % side:
        raise ValueError(f"The image side is {side}, but a divisor of {SIDE} is expected.")
    path = sample_folder() if source == "sample" else Path(source).expanduser()
    if path.is_dir():
        images = {split: _from_parquet(path, split) for split in _SPLITS}
    elif path.is_file():
        images = _from_tensors(path)
    else:
        raise ValueError(
            f"The data {source!r} does not exist: give a folder with train*.parquet and test*.parquet, a tensor file "
            "made by the subcommand 'prepare', or 'sample'."
        )
    return {split: _shrunk(pixels[:cases], side) for split, pixels in images.items()}


def prepare(source: str, target: Path) -> Images:
    """Write the images of parquet files as one tensor file, which needs nothing but torch to be read.

    Args:
        source: What `load_images` takes.
        target: The file to write.

    Returns:
        The images.
    """
    images = load_images(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(images, target)
    return images


def _from_tensors(path: Path) -> Images:
    try:
        images = torch.load(path, weights_only=True)
        sound = all(images[split].dtype == torch.uint8 and images[split].shape[1] == SIDE**2 for split in _SPLITS)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError, IndexError):
        sound = False
    if not sound:
        raise ValueError(
            f"{str(path)!r} does not hold 'train' and 'test' as uint8 tensors of {SIDE**2} pixels a row: make it by "
            "the subcommand 'prepare', or give the folder of the parquet files."
        )
    return {split: images[split] for split in _SPLITS}


def _from_parquet(folder: Path, split: str) -> Tensor:
    try:
        from PIL import Image
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"Reading the parquet files in {str(folder)!r} needs pyarrow and pillow, but {error.name} is missing: "
            "install them, or run the subcommand 'prepare' where they are and give its tensor file as --data."
        ) from error
    files = sorted(folder.glob(f"{split}*.parquet")) or sorted(folder.glob(f"*/{split}*.parquet"))
    if not files:
        raise ValueError(f"The folder {str(folder)!r} has no file {split}*.parquet: give the folder that has.")
    encoded = [image["bytes"] for file in files for image in parquet.read_table(file)["image"].to_pylist()]
    pixels = torch.empty(len(encoded), SIDE**2, dtype=torch.uint8)
    for row, image in enumerate(encoded):
        pixels[row] = torch.frombuffer(
            bytearray(Image.open(io.BytesIO(image)).convert("L").tobytes()), dtype=torch.uint8
        )
    return pixels


def _shrunk(pixels: Tensor, side: int) -> Tensor:
    if side == SIDE:
        return pixels
    square = pixels.view(-1, 1, SIDE, SIDE).float()
    return F.avg_pool2d(square, SIDE // side).round().to(torch.uint8).flatten(1)
