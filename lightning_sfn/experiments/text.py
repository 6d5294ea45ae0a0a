"""Text as characters (Section 7.2): fixed windows of one long string, and the vocabulary that they share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_sfn.data import text_folder
from lightning_sfn.experiments.mnist import as_it_is
from lightning_sfn.experiments.sources import SAMPLE, is_hub_id, load_split

__all__ = ["CharacterText", "Vocabulary", "Windows", "read_text"]

_COLUMNS = ("sentence", "text")
_TRAINING_SHARE = 0.9  # of a source that is one text
_TEXT_SUFFIXES = (".txt", "")


class Vocabulary:
    """The characters of a text, in order.

    Args:
        text: The text.

    Raises:
        MisconfigurationException: If it has fewer than two different characters.
    """

    def __init__(self, text: str) -> None:
        self.characters = "".join(sorted(set(text)))
        if len(self.characters) < 2:
            raise MisconfigurationException(
                f"The training text has {len(text)} characters, {len(self.characters)} of them different, but at least "
                "two different ones are needed: give a longer text."
            )
        self._index = {character: index for index, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str, where: str) -> Tensor:
        """Number the characters of a text.

        Args:
            text: The text.
            where: What it is, for the error message.

        Returns:
            uint8 tensor of shape (len(text),), or int32 where there are more than 256 characters.

        Raises:
            MisconfigurationException: If a character is not in the vocabulary.
        """
        unknown = sorted(set(text) - set(self._index))
        if unknown:
            raise MisconfigurationException(
                f"The {where} text has the character {unknown[0]!r}, which the training text has not "
                f"({len(unknown)} such characters): train on a text that has it, or remove it."
            )
        dtype = torch.uint8 if len(self) <= 256 else torch.int32
        return torch.tensor([self._index[character] for character in text], dtype=dtype)


def read_text(source: str | Path, split: str) -> str:
    """Read one split of a text.

    Args:
        source: ``"sample"`` (tiny Shakespeare), a text file, a folder with ``*{split}*.txt`` (such as Penn Treebank's
            ``ptb.train.txt``; ``valid`` and ``val`` will do as well) or with parquet files, or a Hub id whose rows have
            a ``sentence`` or ``text`` column. Of a single text the first nine tenths are the ``train`` split and the
            rest every other one. Lines and sentences are stripped and end in one line feed.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        The text.

    Raises:
        MisconfigurationException: If there is none, or it is empty or no text.
    """
    path = text_folder() / "train.txt" if source == SAMPLE else Path(source).expanduser()
    if path.is_file() and path.suffix in _TEXT_SUFFIXES:
        text = _from_file(path)
        cut = int(_TRAINING_SHARE * len(text))
        text = text[:cut] if split == "train" else text[cut:]
    elif path.is_dir() and (files := _text_files(path, split)):
        text = _from_file(files[0])
    elif path.is_dir() and (files := sorted(path.glob("*.txt"))) and not _has_rows(path):
        raise MisconfigurationException(
            f"The text source {str(source)!r} has no split {split!r}: a file '{split}.txt' was expected, and the text "
            f"files found are {', '.join(repr(file.name) for file in files)}."
        )
    else:
        text = _from_rows(str(source), split)
    if not text.strip():
        raise MisconfigurationException(f"The text source {str(source)!r} is empty in its split {split!r}.")
    return text


def _text_files(folder: Path, split: str) -> list[Path]:
    """The files that call themselves a split; ``val`` counts as a word of its own alone, not as in "interval"."""
    names = r"valid|(?<![a-z])val(?![a-z])" if split == "validation" else re.escape(split)
    return sorted(file for file in folder.glob("*.txt") if re.search(names, file.stem.lower()))


def _has_rows(folder: Path) -> bool:
    return any(
        next(folder.glob(name), None) for name in ("*.parquet", "*/*.parquet", "dataset_dict.json", "state.json")
    )


def _from_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise MisconfigurationException(
            f"The text file {str(path)!r} cannot be read as UTF-8 text: {error}."
        ) from error
    return "".join(f"{line.strip()}\n" for line in text.splitlines())


def _from_rows(source: str, split: str) -> str:
    rows = load_split(source, split)
    column = next((name for name in _COLUMNS if name in rows.column_names), None)
    if column is None:
        raise MisconfigurationException(
            f"The text source {source!r} has the columns {', '.join(rows.column_names)}, but one of "
            f"{', '.join(_COLUMNS)} is needed."
        )
    return "".join(f"{sentence.strip()}\n" for sentence in rows[column])


class Windows(Dataset[Tensor]):
    """A text cut into windows of equal length that overlap by the one character that is predicted but not read.

    Args:
        characters: As `Vocabulary.encode` gives them.
        length: Characters predicted in each window.

    Raises:
        MisconfigurationException: If the text is too short for one window.
    """

    def __init__(self, characters: Tensor, length: int) -> None:
        count = (len(characters) - 1) // length
        if count < 1:
            raise MisconfigurationException(
                f"A text of {len(characters)} characters has no window of {length}: shorten sequence_length, or give a "
                "longer text."
            )
        self._windows = characters.unfold(0, length + 1, length)[:count]  # a view: one copy in memory

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        """Return one window, int64 of shape (length + 1,)."""
        return self._windows[index].long()

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Return a batch of windows, int64 of shape (len(indices), length + 1)."""
        return self._windows[torch.as_tensor(indices)].long()


class CharacterText(pl.LightningDataModule):
    """A text as windows of characters; a batch is int64 of shape (batch_size, sequence_length + 1).

    Every window is read from a hidden state of zero and nothing is carried from one to the next, so the loss of a
    window depends on the parameters alone.

    Args:
        source: As in `read_text`.
        sequence_length: Characters predicted in each window.
        batch_size: Windows per batch.
        limit: How many characters of the training text to take; all if None.

    Attributes:
        vocabulary: The training text's characters, known after `setup`.

    Raises:
        MisconfigurationException: If an argument is out of range, or, in `setup`, if the text does not do.
    """

    def __init__(
        self,
        source: str | Path = SAMPLE,
        sequence_length: int = 50,
        batch_size: int = 100,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise MisconfigurationException(f"CharacterText got {name}={value}, but it must be at least 1.")
        self.source = str(source)
        self.sequence_length, self.batch_size, self.limit = sequence_length, batch_size, limit
        self.vocabulary: Vocabulary | None = None
        self._windows: dict[str, Windows] = {}

    def prepare_data(self) -> None:
        """Fetch a Hub data set once, on one process, before the others read it from the cache."""
        if is_hub_id(self.source):
            read_text(self.source, "train")

    def setup(self, stage: str | None = None) -> None:
        """Number the characters of both splits, once.

        Args:
            stage: Ignored: validation needs the training text's vocabulary.
        """
        if self._windows:
            return
        text = read_text(self.source, "train")
        held_out = read_text(self.source, "validation")
        vocabulary = Vocabulary(text)
        for name, part in (("train", text[: self.limit]), ("validation", held_out)):
            self._windows[name] = Windows(vocabulary.encode(part, name), self.sequence_length)
        self.vocabulary = vocabulary

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the shuffled loader of the training windows."""
        return DataLoader(self._windows["train"], self.batch_size, shuffle=True, collate_fn=as_it_is)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the loader of the held-out windows, in order."""
        return DataLoader(self._windows["validation"], self.batch_size, collate_fn=as_it_is)
