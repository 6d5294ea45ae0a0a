"""`HessianSpectrum`: logs the ends of the Hessian's spectrum while any optimizer trains."""

from collections import OrderedDict
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.operators import ProductMethod, check_curvature, make_operator
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.newton.spectrum import Spectrum, spectrum_of
from lightning_sfn.trainer.replay import RecordedStep, own_containers, process_mean, replay_closure
from lightning_sfn.trainer.support import is_dry_run, require_replayable
from lightning_sfn.trainer.window import cases_of

__all__ = ["HessianSpectrum"]

_SIGNED_LOG_UNIT = 1e-4  # eigenvalues below this are shown on a linear, above it on a logarithmic scale


class HessianSpectrum(Callback):
    """Logs Ritz values of the Hessian on a fixed set of training batches, whatever the optimizer.

    The first ``num_batches`` training batches are kept, with their random numbers, and every spectrum of the run is
    taken on them. `training_step` is replayed in isolation, so a run with the callback is the run without it.

    Logged are ``hessian/lambda_min``, ``hessian/lambda_max``, ``hessian/negative_fraction``, ``hessian/gradient_norm``,
    ``hessian/residual_max`` and ``hessian/loss``; to TensorBoard also the histogram ``hessian/eigenvalues``, and
    ``hessian/eigenvalues_signed_log`` (``sign(x) log10(1 + |x| / 1e-4)``), in which a small negative bulk stays visible
    beside large eigenvalues.

    Args:
        every_n_epochs: Take a spectrum at the end of every n-th training epoch. The default, if neither is given, is
            every epoch.
        every_n_steps: Take one after every n-th optimizer step instead.
        krylov_dim: Lanczos vectors, each one Hessian-vector product; no more than there are parameters are used.
        num_batches: Training batches that the Hessian is averaged over.
        hvp: How products are computed, as in `SaddleFreeNewton`.

    Attributes:
        last: The last `Spectrum`; ``None`` before the first.

    Raises:
        MisconfigurationException: Both periods are given, or a count is not positive.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        krylov_dim: int = 32,
        num_batches: int = 1,
        *,
        hvp: ProductMethod = "auto",
    ) -> None:
        """See the class."""
        if every_n_epochs is not None and every_n_steps is not None:
            raise MisconfigurationException(
                f"every_n_epochs is {every_n_epochs} and every_n_steps is {every_n_steps}, but only one of them can be "
                "given: leave one out."
            )
        if every_n_epochs is None and every_n_steps is None:
            every_n_epochs = 1
        counts = {
            "every_n_epochs": every_n_epochs,
            "every_n_steps": every_n_steps,
            "krylov_dim": krylov_dim,
            "num_batches": num_batches,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise MisconfigurationException(f"{name} is {count}, but a positive number is expected.")
        try:
            check_curvature("hessian", hvp)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.krylov_dim, self.num_batches = krylov_dim, num_batches
        self._hvp = hvp
        self.last: Spectrum | None = None
        self._probe: list[RecordedStep] = []
        self._probed_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, and starts afresh when the same object is used for another fit."""
        if stage == "fit":
            require_replayable(trainer, pl_module, type(self).__name__)
            if not trainer.loggers and not is_dry_run(trainer):
                raise MisconfigurationException(
                    "HessianSpectrum needs a logger, but the Trainer has none: pass logger=TensorBoardLogger(...)."
                )
            self.last, self._probe, self._probed_at = None, [], 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses parameters whose curvature cannot be taken, before anything is spent."""
        try:
            FlatParameters(pl_module.parameters())
        except ValueError as error:
            raise MisconfigurationException(f"HessianSpectrum: {error}") from error

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the first batches of the run."""
        if len(self._probe) < self.num_batches:
            arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
            state = RandomState.capture(pl_module.device)
            self._probe.append(RecordedStep(own_containers(tuple(arguments.values())), {}, state, None))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes a spectrum where a multiple of ``every_n_steps`` was reached."""
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self._probed_at:
            self._probed_at = step
            self._take(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a spectrum at the end of every n-th epoch."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._take(trainer, pl_module)

    def _take(self, trainer: Trainer, module: LightningModule) -> None:
        parameters = FlatParameters(module.parameters())
        objective = Objective(
            [replay_closure(trainer, module, step) for step in self._probe],
            [cases_of(step) for step in self._probe],
            random_states=[step.random_state for step in self._probe],
            reduce=process_mean(trainer),
        )
        if self.last is None:
            objective.require_repeatable(objective.value())
        self.last = spectrum_of(make_operator(objective, parameters, "hessian", self._hvp), self.krylov_dim)
        self._log(trainer, self.last)

    def _log(self, trainer: Trainer, spectrum: Spectrum) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        names = ("lambda_min", "lambda_max", "negative_fraction", "gradient_norm", "residual_max", "loss")
        metrics = {f"hessian/{name}": float(getattr(spectrum, name)) for name in names}
        finite = spectrum.eigenvalues[torch.isfinite(spectrum.eigenvalues)]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if trainer.is_global_zero and add_histogram is not None and len(finite):
                add_histogram("hessian/eigenvalues", finite, step)
                add_histogram("hessian/eigenvalues_signed_log", _signed_log(finite), step)


def _signed_log(values: Tensor) -> Tensor:
    return values.sign() * torch.log10(1 + values.abs() / _SIGNED_LOG_UNIT)
