"""The multilayer perceptron of Sections 3 and 7.1.1, as an ordinary Lightning module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["Perceptron"]


class Perceptron(pl.LightningModule):
    """Fully connected tanh layers and a softmax classifier, trained on the cross-entropy.

    ``train_loss`` and ``val_loss`` (mean cross-entropy) and ``train_error`` and ``val_error`` (share of wrong classes)
    are logged once per epoch.

    Args:
        sizes: Layer widths from the number of pixels to the number of classes, at least two.
        optimizer: Called with the parameters; returns the optimizer.

    Raises:
        MisconfigurationException: If `sizes` has fewer than two entries, one that is not positive, or fewer than two
            classes.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (100, 25, 10),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or any(size < 1 for size in sizes) or sizes[-1] < 2:
            raise MisconfigurationException(
                f"Perceptron got sizes={list(sizes)}, but positive layer widths from the number of pixels to at least "
                "two classes are needed."
            )
        self.width = sizes[0]
        self.optimizer = optimizer
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        self.layers = nn.Sequential(*layers[:-1])
        self.train_accuracy = MulticlassAccuracy(sizes[-1], average="micro")
        self.val_accuracy = MulticlassAccuracy(sizes[-1], average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Score the classes.

        Args:
            images: Shape (batch, sizes[0]).

        Returns:
            Logits of shape (batch, sizes[-1]).

        Raises:
            MisconfigurationException: If the images have another number of pixels.
        """
        if images.shape[-1] != self.width:
            raise MisconfigurationException(
                f"Perceptron has sizes[0]={self.width}, but the images have {images.shape[-1]} pixels: set sizes[0] "
                "to image_size squared."
            )
        logits: Tensor = self.layers(images)
        return logits

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats."""
        return F.cross_entropy(self(images), labels)

    @torch.no_grad()
    def error(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images whose most likely class is wrong."""
        return float((self(images).argmax(dim=1) != labels).double().mean())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; log its epoch mean and the error."""
        return self._step("train", self.train_accuracy, *batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and error of held-out images."""
        self._step("val", self.val_accuracy, *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the means of loss and error of test images as ``test_loss`` and ``test_error``."""
        self.log("test_loss", self.loss(*batch), sync_dist=True)
        self.log("test_error", self.error(*batch), sync_dist=True)

    def _step(self, stage: str, accuracy: MulticlassAccuracy, images: Tensor, labels: Tensor) -> Tensor:
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy.update(logits, labels)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the training error of the epoch over all processes."""
        self._log_error("train", self.train_accuracy)

    def on_validation_epoch_end(self) -> None:
        """Log the error on held-out images over all processes."""
        self._log_error("val", self.val_accuracy)

    def _log_error(self, stage: str, accuracy: MulticlassAccuracy) -> None:
        self.log(f"{stage}_error", 1 - accuracy.compute(), prog_bar=True)
        accuracy.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer over all parameters."""
        return self.optimizer(self.parameters())
