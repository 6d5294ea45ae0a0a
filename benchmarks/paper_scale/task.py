"""What every method trains: the network, the images on the device, and what is measured along the way."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.plateau import Problem
from lightning_sfn.newton.curvature import gradient_of
from paper_scale.images import Images
from paper_scale.settings import Settings

__all__ = ["Task", "unit_floats"]


def unit_floats(images: Tensor) -> Tensor:
    """Pixels of 0..255 as float32 in [0, 1]."""
    return images.float() / 255


@dataclass(frozen=True)
class Task:
    """The training problem of one configuration.

    Attributes:
        settings: Sizes.
        train: uint8 images on the device, shape (N, side * side).
        test: Likewise.
    """

    settings: Settings
    train: Tensor
    test: Tensor

    @classmethod
    def on(cls, device: torch.device, images: Images, settings: Settings) -> "Task":
        """The images brought to a device, once.

        Raises:
            ValueError: There are fewer images than in one mini-batch.
        """
        if len(images["train"]) < settings.batch_size:
            raise ValueError(
                f"There are {len(images['train'])} training images, but one mini-batch has {settings.batch_size}: give "
                "more images, or a smaller batch_size."
            )
        return cls(settings, images["train"].to(device), images["test"].to(device))

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.train.device

    def problem(self) -> Problem:
        """A network in the one initialization that all methods share, with its training problem."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            model = Autoencoder(self.settings.sizes, "sigmoid", "cross_entropy", initialization="sparse")
        model = model.to(self.device)

        def loss(images: Tensor) -> Tensor:
            return model.reconstruction_loss(unit_floats(images))

        return Problem(model, self.train, loss, lambda: self.errors(model, self.train)[0], self.settings.part)

    @torch.no_grad()
    def errors(self, model: torch.nn.Module, images: Tensor) -> tuple[float, float]:
        """Squared error (the paper's) and cross-entropy: summed over pixels, averaged over images in float64.

        Args:
            model: The network.
            images: uint8 images.
        """
        squared = torch.zeros((), dtype=torch.float64, device=images.device)
        entropy = torch.zeros_like(squared)
        for part in torch.split(images, self.settings.part):
            pixels = unit_floats(part)
            logits = model.decoder(model.encoder(pixels))
            squared += (torch.sigmoid(logits) - pixels).square().sum(dtype=torch.float64)
            entropy += F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(dtype=torch.float64)
        return float(squared) / len(images), float(entropy) / len(images)

    def measure(self, problem: Problem, *, spectrum: bool) -> dict[str, Any]:
        """Everything that a row of the results file says about a point.

        Args:
            problem: The problem at that point.
            spectrum: Whether to compute the ends of the Hessian's spectrum too, on some images, always the same.

        Returns:
            Errors, cross-entropy, gradient norm on all training images, and the eigenvalue ends with the residual of
            the smallest one.
        """
        error, entropy = self.errors(problem.model, self.train)
        row: dict[str, Any] = {
            "train_error": error,
            "test_error": self.errors(problem.model, self.test)[0],
            "cross_entropy": entropy,
        }
        if not math.isfinite(entropy):
            return row
        _, gradient = gradient_of(problem.objective(), problem.parameters)
        row["gradient_norm"] = float(gradient.norm())
        if spectrum:
            rows = torch.arange(min(self.settings.probe_cases, len(self.train)), device=self.device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is not converged is said by the residual
                found = problem.spectrum(rows, min(self.settings.probe_dim, problem.parameters.size))
            row |= {
                "lambda_min": found.lambda_min,
                "lambda_min_residual": float(found.residuals[0]),
                "lambda_max": found.lambda_max,
            }
        return row
