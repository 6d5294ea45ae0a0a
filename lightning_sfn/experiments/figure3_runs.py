"""The runs of Figure 3: one network by SGD, or by an exact method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from lightning_sfn.experiments.classified import labelled_images
from lightning_sfn.experiments.perceptron import Perceptron
from lightning_sfn.experiments.runner import Result
from lightning_sfn.newton import Objective, SaddleFreeNewton, hessian_spectrum

__all__ = ["DIVERGED", "Settings", "newton_run", "sgd_run"]

CLASSES = 10
DIVERGED = 1e9
"""What stands for a loss that is not finite; a run ends with it."""

_PROBE_DIM = 80


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        hidden: Hidden units of the networks.
        image_size: Side of the images in pixels.
        cases: Training images from the front of the data set; all if None.
        newton_epochs: Full-batch steps of damped Newton and of SFN, one an epoch.
        sgd_epochs: Epochs of SGD.
        draws: Draws of SGD's random search.
        part: Images in one part of the full batch (memory, not mathematics).
        probes: Spectra taken along a run of SGD.
    """

    hidden: tuple[int, ...] = (5, 25, 50)
    image_size: int = 10
    cases: int | None = None
    newton_epochs: int = 100
    sgd_epochs: int = 1000
    draws: int = 80
    part: int = 2000
    probes: int = 10


@lru_cache(maxsize=2)
def load(dataset: str, source: str, image_size: int, cases: int | None) -> tuple[Tensor, Tensor]:
    """The training set in float64, in which exact eigenvalues near zero can be told apart."""
    pixels, labels = labelled_images(dataset, source, image_size=image_size, limit=cases)
    return (pixels / 255 if pixels.dtype == torch.uint8 else pixels).double(), labels


def network(seed: int, hidden: int, pixels: int, device: str) -> Perceptron:
    """The network of a seed: the same start for every method."""
    torch.manual_seed(seed)
    return Perceptron((pixels, hidden, CLASSES)).double().to(device)


def newton_run(
    *, dataset: str, source: str, hidden: int, method: str, seed: int, settings: Settings, device: str
) -> Result:
    """One run of an exact method: all eigenvalues, damping by best improvement (Appendix F.1).

    Args:
        dataset: ``"mnist"`` or ``"cifar10"``.
        source: Where it comes from.
        hidden: Hidden units.
        method: ``"damped_newton"`` or ``"saddle_free"``.
        seed: Seed of the start.
        settings: Sizes.
        device: Where to compute.

    Returns:
        The curves over epochs, epoch 0 being the start.
    """
    images, labels = (tensor.to(device) for tensor in load(dataset, source, settings.image_size, settings.cases))
    model = network(seed, hidden, images.shape[1], device)
    optimizer = SaddleFreeNewton.as_in_paper(
        model.parameters(),
        krylov_dim="full",
        inner_steps=1,
        trust_region=method,
    )
    errors, losses, lowest = [model.error(images, labels)], [float(model.loss(images, labels).detach())], []
    for _ in range(settings.newton_epochs):
        optimizer.step_on(full_batch(model, images, labels, settings.part))
        assert optimizer.last_step is not None
        lowest.append(optimizer.last_step.lambda_min)  # of the Hessian before the step
        errors.append(model.error(images, labels))
        losses.append(optimizer.last_step.loss_after)
        if not optimizer.last_step.accepted:
            break  # the function is the same at every step: it would be refused for ever
    return {
        "dataset": dataset,
        "hidden": hidden,
        "method": method,
        "seed": seed,
        "errors": errors,
        "losses": losses,
        "probe_epochs": list(range(len(lowest))),
        "lambda_min": lowest,
        "stopped": not optimizer.last_step.accepted if optimizer.last_step is not None else False,
    }


def full_batch(model: Perceptron, images: Tensor, labels: Tensor, part: int) -> Objective:
    """The mean loss over all images, in parts."""
    chunks = list(zip(torch.split(images, part), torch.split(labels, part), strict=True))
    return Objective([partial(model.loss, *chunk) for chunk in chunks], [len(chunk[1]) for chunk in chunks])


def sgd_run(
    *,
    dataset: str,
    source: str,
    hidden: int,
    seed: int,
    settings: Settings,
    device: str,
    lr: float,
    momentum: float,
    batch_size: int,
    probes: int,
) -> Result:
    """One run of mini-batch SGD with momentum.

    Args:
        dataset: ``"mnist"`` or ``"cifar10"``.
        source: Where it comes from.
        hidden: Hidden units.
        seed: Seed of the start and of the order of the images.
        settings: Sizes.
        device: Where to compute.
        lr: Learning rate.
        momentum: Momentum coefficient.
        batch_size: Images in a mini-batch.
        probes: Spectra taken along the run, at epochs that grow geometrically.

    Returns:
        The curves over epochs, epoch 0 being the start.
    """
    images, labels = (tensor.to(device) for tensor in load(dataset, source, settings.image_size, settings.cases))
    model = network(seed, hidden, images.shape[1], device)
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    errors, losses = [model.error(images, labels)], [float(model.loss(images, labels).detach())]
    probe_epochs, lowest = [], []
    wanted = {round(settings.sgd_epochs ** (i / (probes - 1))) for i in range(probes)} if probes > 1 else set()
    for epoch in range(1, settings.sgd_epochs + 1):
        for rows in torch.split(torch.randperm(len(images), generator=generator), batch_size):
            optimizer.zero_grad()
            model.loss(images[rows], labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses.append(float(model.loss(images, labels).detach()))
        errors.append(model.error(images, labels) if math.isfinite(losses[-1]) else 1.0)
        if not math.isfinite(losses[-1]):
            losses[-1] = DIVERGED
            break
        if epoch in wanted:
            probe_epochs.append(epoch)
            closure, dimension = partial(model.loss, images, labels), min(_PROBE_DIM, sum(p.numel() for p in weights))
            lowest.append(hessian_spectrum(closure, weights, krylov_dim=dimension).lambda_min)
    return {
        "dataset": dataset,
        "hidden": hidden,
        "method": "sgd",
        "seed": seed,
        "errors": errors,
        "losses": losses,
        "probe_epochs": probe_epochs,
        "lambda_min": lowest,
        "lr": lr,
        "momentum": momentum,
        "batch_size": batch_size,
    }
