"""The paper's deep autoencoder, as an ordinary Lightning module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn.experiments.metrics import SquaredError

_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
_LOSSES = ("squared_error", "cross_entropy")
_INCOMING = 15  # weights of each unit that the sparse initialization draws (Martens 2010, Sutskever et al. 2013)


class Autoencoder(pl.LightningModule):
    """A deep autoencoder: an encoder down to a code, and its mirror image up to a sigmoid output.

    Automatic optimization with one optimizer. ``train_loss`` and ``val_loss`` are logged once per epoch, and with the
    cross-entropy also ``train_squared_error`` and ``val_squared_error``, which the paper reports.
    Hyperparameters are not written into checkpoints, so that on resuming a run the command's configuration decides.

    Args:
        sizes: Layer widths from the input to the code, at least two; the decoder runs through them backwards.
        activation: Non-linearity of the hidden layers.
        loss: ``"squared_error"``, or ``"cross_entropy"`` between pixels read as probabilities. Either is summed over
            the pixels of an image and averaged over the images of a batch.
        linear_code: Whether the code layer is linear, as in the paper; otherwise it has the activation too.
        initialization: ``"default"`` as PyTorch's layers start, or ``"sparse"`` (Martens 2010): 15 incoming weights of
            each unit drawn from N(0, 1), the others and the biases 0.
        optimizer: Called with the parameters; returns the optimizer.

    Raises:
        MisconfigurationException: If `sizes`, `activation`, `loss` or `initialization` is not one of the above.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (100, 64, 32, 16, 8),
        activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid",
        loss: Literal["squared_error", "cross_entropy"] = "squared_error",
        linear_code: bool = True,
        initialization: Literal["default", "sparse"] = "default",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or any(size < 1 for size in sizes):
            raise MisconfigurationException(
                f"Autoencoder got sizes={list(sizes)}, but at least two positive layer widths are needed, from the "
                "number of pixels to the width of the code."
            )
        if activation not in _ACTIVATIONS:
            raise MisconfigurationException(
                f"Autoencoder got activation={activation!r}, but it must be one of {', '.join(_ACTIVATIONS)}."
            )
        if loss not in _LOSSES:
            raise MisconfigurationException(
                f"Autoencoder got loss={loss!r}, but it must be one of {', '.join(_LOSSES)}."
            )
        if initialization not in ("default", "sparse"):
            raise MisconfigurationException(
                f"Autoencoder got initialization={initialization!r}, but it must be 'default' or 'sparse'."
            )
        self.width = sizes[0]
        self.loss = loss
        self.optimizer = optimizer
        self.encoder = _dense_stack(sizes, _ACTIVATIONS[activation])
        if not linear_code:
            self.encoder.append(_ACTIVATIONS[activation]())
        self.decoder = _dense_stack(sizes[::-1], _ACTIVATIONS[activation])
        if initialization == "sparse":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    _start_sparse(layer)
        self.train_squared_error, self.val_squared_error = SquaredError(), SquaredError()

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images.

        Args:
            images: Float tensor of shape (batch, sizes[0]) in [0, 1].

        Returns:
            Reconstructions of the same shape and dtype, in (0, 1).
        """
        return torch.sigmoid(self._logits(images))

    def reconstruction_loss(self, images: Tensor) -> Tensor:
        """Measure how well images are reconstructed.

        Args:
            images: Float tensor of shape (batch, sizes[0]) in [0, 1].

        Returns:
            Scalar: the loss summed over pixels and averaged over images.
        """
        return self._loss_and_output(self._logits(images), images)[0]

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return loss and output of a batch of images; log the epoch mean over all processes as ``train_loss``."""
        return self._step("train", batch, self.train_squared_error)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of a batch of held-out images as ``val_loss``."""
        self._step("val", batch, self.val_squared_error)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of a batch of test images as ``test_loss``."""
        self.log("test_loss", self.reconstruction_loss(batch), sync_dist=True)

    def _step(self, stage: str, batch: Tensor, squared_error: SquaredError) -> dict[str, Tensor]:
        logits = self._logits(batch)
        loss, output = self._loss_and_output(logits, batch)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        if self.loss == "cross_entropy":
            squared_error.update(torch.sigmoid(logits), batch)
            self.log(f"{stage}_squared_error", squared_error, on_step=False, on_epoch=True, prog_bar=True)
        return {"loss": loss, "output": output}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer over all parameters."""
        return self.optimizer(self.parameters())

    def _logits(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.width:
            raise MisconfigurationException(
                f"Autoencoder has sizes[0]={self.width}, but the images have {images.shape[-1]} pixels: set sizes[0] "
                "to image_size squared (100 for data.image_size 10)."
            )
        logits: Tensor = self.decoder(self.encoder(images))
        return logits

    def _loss_and_output(self, logits: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and what it is a convex function of (for the Gauss-Newton matrix)."""
        if self.loss == "cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / images.shape[0], logits
        output = torch.sigmoid(logits)
        return F.mse_loss(output, images, reduction="sum") / images.shape[0], output


@torch.no_grad()
def _start_sparse(layer: nn.Linear) -> None:
    """Martens' sparse initialization: a few strong incoming weights for each unit."""
    layer.weight.zero_()
    layer.bias.zero_()
    for row in layer.weight:
        chosen = torch.randperm(layer.in_features)[:_INCOMING]
        row[chosen] = torch.randn(len(chosen))


def _dense_stack(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Chain linear layers with an activation between them; the last one stays linear."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), activation()]
    return nn.Sequential(*layers[:-1])
