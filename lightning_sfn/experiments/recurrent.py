"""The character-level language model of Section 7.2, as an ordinary Lightning module."""

from __future__ import annotations

import math

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn.experiments.metrics import BitsPerCharacter
from lightning_sfn.experiments.text import Vocabulary
from lightning_sfn.newton.recurrence import tanh_recurrence

__all__ = ["CharacterRNN"]


class CharacterRNN(pl.LightningModule):
    """One recurrent layer of tanh units that predicts the next character.

    Recurrent weights start orthogonal (Saxe et al. 2014; Appendix F.3). The hidden state starts at zero in every
    window and is not carried over, and the gradient runs through the whole window: the loss is a fixed function of the
    parameters and the batch, which a second-order step needs. ``train_loss`` and ``val_loss`` (nats) and
    ``train_bits`` and ``val_bits`` (bits per character) are logged once per epoch.

    Args:
        vocabulary_size: Number of different characters: 65 in tiny Shakespeare, 50 in Penn Treebank.
        hidden_size: Number of tanh units.
        optimizer: Called with the parameters; returns the optimizer.

    Raises:
        MisconfigurationException: If a size is out of range.
    """

    def __init__(
        self,
        vocabulary_size: int = 65,
        hidden_size: int = 120,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    ) -> None:
        super().__init__()
        if vocabulary_size < 2 or hidden_size < 1:
            raise MisconfigurationException(
                f"CharacterRNN got vocabulary_size={vocabulary_size} and hidden_size={hidden_size}, but at least 2 "
                "characters and 1 unit are needed."
            )
        self.vocabulary_size = vocabulary_size
        self.optimizer = optimizer
        # The input is one character at a time, so its weight matrix is a table.
        self.input = nn.Embedding(vocabulary_size, hidden_size)
        self.recurrent = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.output = nn.Linear(hidden_size, vocabulary_size)
        nn.init.normal_(self.input.weight, std=1 / math.sqrt(hidden_size))
        nn.init.orthogonal_(self.recurrent)
        self.train_bits, self.val_bits = BitsPerCharacter(), BitsPerCharacter()

    def forward(self, characters: Tensor) -> Tensor:
        """Predict the character after each one.

        Args:
            characters: int64 of shape (batch, time).

        Returns:
            Logits of shape (batch, time, vocabulary_size).
        """
        # Not nn.RNN: cuDNN's kernel has no second derivative, and this one's is twice as fast as autograd's.
        inputs = self.input(characters.T) + self.bias
        states = tanh_recurrence(inputs, torch.zeros_like(inputs[0]), self.recurrent)
        logits: Tensor = self.output(states).transpose(0, 1)
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch of windows, in nats per predicted character.

        Args:
            windows: int64 of shape (batch, time + 1).
        """
        logits = self(windows[:, :-1]).transpose(0, 1)  # as they lie in memory
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].T.flatten())

    def setup(self, stage: str) -> None:
        """Compare the vocabulary with that of the data module, if that is a `CharacterText`.

        Args:
            stage: Ignored.

        Raises:
            MisconfigurationException: If the text has more different characters than the model.
        """
        vocabulary = getattr(self.trainer.datamodule, "vocabulary", None)  # type: ignore[attr-defined]
        if isinstance(vocabulary, Vocabulary) and len(vocabulary) > self.vocabulary_size:
            raise MisconfigurationException(
                f"CharacterRNN has vocabulary_size={self.vocabulary_size}, but the text has {len(vocabulary)} "
                "different characters: set model.vocabulary_size to their number."
            )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch; log its epoch mean in nats and in bits."""
        return self._step("train", self.train_bits, batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of held-out windows."""
        self._step("val", self.val_bits, batch)

    def _step(self, stage: str, bits: BitsPerCharacter, batch: Tensor) -> Tensor:
        loss = self.loss(batch)
        bits.update(loss.detach() * batch[:, 1:].numel(), batch[:, 1:].numel())
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log(f"{stage}_bits", bits, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer over all parameters."""
        return self.optimizer(self.parameters())
