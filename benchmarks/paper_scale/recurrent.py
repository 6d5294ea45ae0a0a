"""The recurrent network of Figure 4 (c): what is trained and measured instead of the autoencoder."""

import math

import torch
from torch import Tensor

from lightning_sfn.experiments.plateau import Problem
from lightning_sfn.experiments.recurrent import CharacterRNN
from lightning_sfn.experiments.text import Vocabulary, read_text
from paper_scale.images import Images
from paper_scale.task import Task

__all__ = ["LENGTH", "RecurrentTask", "load_windows"]

LENGTH = 50
"""Characters that are predicted in each window (Appendix F.3 truncates there)."""


def load_windows(source: str, *, cases: int | None = None) -> Images:
    """Load a text as windows that overlap by one character.

    Args:
        source: A folder with ``*train*.txt`` and ``*test*.txt`` (such as Penn Treebank's), or ``"sample"`` (tiny
            Shakespeare).
        cases: Windows to take from the front of each split; all if None.

    Returns:
        ``train`` and ``test``: uint8 of shape (N, 51).

    Raises:
        MisconfigurationException: There is no such text, or the splits have different characters.
    """
    texts = {split: read_text(source, split) for split in ("train", "test")}
    vocabulary = Vocabulary(texts["train"])
    encoded = {split: vocabulary.encode(text, split) for split, text in texts.items()}
    return {split: text.unfold(0, LENGTH + 1, LENGTH)[:cases].contiguous() for split, text in encoded.items()}


class RecurrentTask(Task):
    """120 tanh units on characters; the error is in bits, the cross-entropy in nats, both per character."""

    def problem(self) -> Problem:
        """A network in the one initialization that all methods share, with its training problem."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            model = CharacterRNN(int(self.train.max()) + 1)
        model = model.to(self.device)
        return Problem(
            model,
            self.train,
            lambda windows: model.loss(windows.long()),
            lambda: self.errors(model, self.train)[0],
            self.settings.part,
        )

    @torch.no_grad()
    def errors(self, model: torch.nn.Module, images: Tensor) -> tuple[float, float]:
        """Bits and nats per character of some windows.

        Args:
            model: The network.
            images: uint8 windows.
        """
        parts = torch.split(images, self.settings.part)
        nats = sum(float(model.loss(part.long())) * len(part) for part in parts) / len(images)
        return nats / math.log(2), nats
