"""Where the time of a Newton step goes: in plain torch, after `SwitchToSFN`, and under the strategy."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sfn import SFNStrategy, SwitchToSFN
from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.newton import (
    HessianOperator,
    KroneckerFactors,
    Objective,
    SaddleFreeNewton,
    krylov,
    optimizer,
    outer_step,
    secant_steps,
    step,
)
from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.trainer.window import WindowedNewton

from .timing import Clock, now

Make = Callable[[Any], SaddleFreeNewton]
Way = Callable[[Make, torch.device, bool], int]

TARGETS = {"trial losses": 0.15, "everything else": 0.05}


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Shares of the shipped recipe's network, each way to run it, in both coordinates."""
    ways = {"plain torch": plain, "SwitchToSFN": switched, "strategy 'sfn'": strategy}
    return [
        {"where": name, "coordinates": coordinates, **shares(way, coordinates, device, quick)}
        for name, way in ways.items()
        for coordinates in ("diagonal", "kronecker")
    ]


def shares(way: Way, coordinates: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """Times every call inside the steps of a run."""
    clock = Clock(partial(now, device))
    for owner, method, part in (
        (WindowedNewton, "_newton_step", "everything else"),
        (SaddleFreeNewton, "step_on", "everything else"),
        (krylov, "fill_basis", "orthogonalisation"),
        (krylov._Extension, "add", "orthogonalisation"),
        (HessianOperator, "_matvec", "products"),
        (HessianOperator, "_build", "products"),
        (step, "gradient_of", "gradients"),
        (outer_step, "gradient_of", "gradients"),
        (secant_steps, "gradient_of", "gradients"),
        (optimizer, "gradient_of", "gradients"),  # of steps that are confirmed or taken back
        (CurvatureOperator, "loss_and_gradient", "gradients"),
        (HessianOperator, "loss_and_gradient", "gradients"),
        (Objective, "value", "trial losses"),
        (Objective, "local_value", "trial losses"),
        (KroneckerFactors, "refresh", "factors"),
        (KroneckerFactors, "_map", "factors"),
        (KroneckerFactors, "shares", "factors"),
    ):
        clock.wrap(owner, method, part)
    try:
        steps = way(partial(SaddleFreeNewton, preconditioner=coordinates), device, quick)
    finally:
        clock.unwrap()
    total = sum(clock.seconds.values())
    parts = ("products", "gradients", "trial losses", "orthogonalisation", "factors", "everything else")
    return {
        "steps": steps,
        "seconds_per_step": total / max(steps, 1),
        "shares": {part: clock.seconds[part] / total for part in parts},
        "targets": TARGETS,
    }


def _data(device: torch.device, quick: bool) -> Tensor:
    return torch.rand(200 if quick else 5000, 100, generator=torch.Generator().manual_seed(0)).to(device)


def plain(make: Make, device: torch.device, quick: bool) -> int:
    """Full-batch closures."""
    torch.manual_seed(0)
    model, images = Autoencoder(sizes=[100, 64, 32, 16, 4]).to(device), _data(device, quick)
    newton = make(model.parameters())
    steps = 2 if quick else 8
    for _ in range(steps):
        newton.step(lambda: model.reconstruction_loss(images))
    return steps


def switched(make: Make, device: torch.device, quick: bool) -> int:
    """The callback on windows of an epoch."""
    switch = SwitchToSFN(switch_at_epoch=1, probe_dim=0, optimizer=make)
    _fit(device, quick, [switch], "auto", 3 if quick else 6)
    assert switch.report is not None
    return switch.report.newton_steps


def strategy(make: Make, device: torch.device, quick: bool) -> int:
    """The strategy, which takes a saddle-free Newton step at the end of each epoch, from the first one on."""
    steps = 2 if quick else 5
    _fit(device, quick, [], SFNStrategy(make), steps)
    return steps


def _fit(device: torch.device, quick: bool, callbacks: list[Callback], strategy: Any, epochs: int) -> None:
    seed_everything(0, verbose=False)
    loader = DataLoader(_data(torch.device("cpu"), quick), batch_size=100)  # type: ignore[arg-type]
    module = Autoencoder(sizes=[100, 64, 32, 16, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            strategy=strategy,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
