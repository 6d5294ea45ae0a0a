"""A Trainer that can also look at a checkpoint: ``trainer.spectrum(model, datamodule, ckpt_path=...)``."""

import os
import pickle
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from lightning_sfn.newton.operators import CurvatureName, ProductMethod, check_curvature
from lightning_sfn.newton.spectrum import Spectrum, SpectrumSettings
from lightning_sfn.newton.verdict import NewtonTrial
from lightning_sfn.trainer.probe import Probe, ProbeBatches
from lightning_sfn.trainer.support import require_replayable

__all__ = ["InspectingTrainer"]


class InspectingTrainer(Trainer):
    """A Trainer with one more method beside `fit`, `validate`, `test` and `predict`: `spectrum`.

    Attributes:
        verdict: What the last spectrum means, in words.
    """

    verdict = ""

    def spectrum(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        *,
        output: str | None = None,
        plot: str | None = None,
        overwrite: bool = False,
        num_batches: int = 10,
        krylov_dim: int = 64,
        smallest: int = 5,
        largest: int = 5,
        tol: float | None = 1e-3,
        max_products: int | None = None,
        density: bool = False,
        density_probes: int = 4,
        curvature: CurvatureName = "hessian",
        hvp: ProductMethod = "auto",
        precision: Literal[32, 64] = 32,
    ) -> Spectrum | None:
        """Look at the Hessian of a checkpoint: both ends of its spectrum, its density, and what they mean.

        Args:
            model: The module; its parameters are those of the checkpoint afterwards.
            train_dataloaders: Training batches, if there is no data module.
            datamodule: Where the training batches come from.
            ckpt_path: The checkpoint; the module is looked at as it is if left out.
            output: Write every number to this JSON file, which `Spectrum.load` reads.
            plot: Draw the spectrum into this file (.png, .pdf, .svg).
            overwrite: Whether files of those names may be replaced.
            num_batches: Training batches that the Hessian is averaged over, shared out over the devices.
            krylov_dim: Lanczos vectors, each one Hessian-vector product.
            smallest: Eigenvalues that have to converge at the lower end, at most half of ``krylov_dim``.
            largest: Eigenvalues that have to converge at the upper end, likewise.
            tol: Restart until their residuals are below this share of each; null takes one basis.
            max_products: Products after which restarts end; four times ``krylov_dim`` if left out.
            density: Whether to estimate the spectral density as well.
            density_probes: Its random vectors, each ``krylov_dim`` more products.
            curvature: ``hessian`` or ``gauss_newton``.
            hvp: How products are computed: ``auto``, ``retain``, ``recompute`` or ``finite_difference``.
            precision: 32 or 64 bits: the least precision of the computation.

        Returns:
            The spectrum; ``None`` if it was taken in another process.

        Raises:
            MisconfigurationException: A value is out of its range, a file exists, or the checkpoint is not the model's.
        """
        try:
            check_curvature(curvature, hvp)
            settings = SpectrumSettings(krylov_dim, smallest, largest, tol, max_products, density_probes * density)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if num_batches < 1:
            raise MisconfigurationException(f"num_batches is {num_batches}, but a positive number is expected.")
        for path in (output, plot):
            _require_writable(path, overwrite)
        inspection = _Inspection(Probe(settings, curvature, hvp, precision), num_batches, ckpt_path, output, plot)
        self._only_start(inspection)
        self.fit(model, train_dataloaders, datamodule=datamodule)
        self.verdict = inspection.verdict
        return inspection.spectrum

    def _only_start(self, inspection: Callback) -> None:
        """Prepares a fit that sets everything up and ends before its first batch."""
        self.callbacks = [inspection]
        self.loggers = []
        self.num_sanity_val_steps = 0
        self.limit_val_batches = 0
        self.fit_loop.min_epochs, self.fit_loop.max_epochs = None, -1
        self.fit_loop.epoch_loop.min_steps, self.fit_loop.epoch_loop.max_steps = None, -1


class _Inspection(Callback):
    """Takes one spectrum where training would start, and stops there."""

    def __init__(
        self, probe: Probe, num_batches: int, ckpt_path: str | None, output: str | None, plot: str | None
    ) -> None:
        self._probe, self._num_batches, self._ckpt_path = probe, num_batches, ckpt_path
        self._output, self._plot = output, plot
        self.spectrum: Spectrum | None = None
        self.verdict = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work."""
        require_replayable(trainer, pl_module, "A spectrum")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the parameters, draws the batches, takes the spectrum and stops."""
        trainer.should_stop = True
        if self._ckpt_path is not None:
            _load_parameters(trainer, pl_module, self._ckpt_path)
        batches = _draw(trainer, pl_module, self._num_batches)
        at_most = self._probe.settings.most_products(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))
        with tqdm(
            total=at_most, desc="Hessian-vector products (at most)", disable=not trainer.is_global_zero, leave=False
        ) as bar:
            self.spectrum = self._probe.spectrum(
                trainer, pl_module, batches, check=True, progress=lambda done, _: bar.update(done - bar.n)
            )
        self.verdict, trial = self._probe.verdict(trainer, pl_module, batches, self.spectrum)
        if trainer.is_global_zero:
            self._write(self.spectrum, trial)

    def _write(self, spectrum: Spectrum, trial: NewtonTrial | None) -> None:
        if self._output is not None:
            decrease = (
                {} if trial is None else {"sfn_predicted_decrease": trial.predicted, "sfn_decrease": trial.measured}
            )
            spectrum.save(
                self._output,
                verdict=self.verdict,
                curvature=self._probe.curvature,
                checkpoint=self._ckpt_path,
                num_batches=self._num_batches,
                **decrease,
            )
        if self._plot is not None:
            spectrum.plot().savefig(self._plot, dpi=120)


def _require_writable(path: str | None, overwrite: bool) -> None:
    if path is None:
        return
    if os.path.exists(path) and not overwrite:
        raise MisconfigurationException(f"{path} exists: choose another name, or replace it with overwrite=True.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _load_parameters(trainer: Trainer, module: LightningModule, path: str) -> None:
    """Loads a checkpoint's parameters and buffers, and the epoch that it was written in; nothing else."""
    if not os.path.exists(path):
        raise MisconfigurationException(f"There is no checkpoint {path}: give the path of an existing one.")
    try:
        checkpoint = trainer.strategy.load_checkpoint(path)
        module.on_load_checkpoint(checkpoint)
        trainer.strategy.load_model_state_dict(checkpoint)
    except (pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
        raise MisconfigurationException(
            f"{path} is not a checkpoint that Lightning wrote ({type(error).__name__}): give one that "
            "trainer.save_checkpoint or ModelCheckpoint made."
        ) from error
    except RuntimeError as error:
        difference = " ".join(str(error).split())[:300]
        raise MisconfigurationException(
            f"{path} does not fit {type(module).__name__}: build the model with the options that it was trained with. "
            f"({difference})"
        ) from error
    trainer.fit_loop.epoch_progress.current.completed = checkpoint.get("epoch", 0)


def _draw(trainer: Trainer, module: LightningModule, count: int) -> ProbeBatches:
    """The first training batches, on the device."""
    batches = ProbeBatches(count)
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    for batch, number, dataloader_idx in loader:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        batches.offer(trainer, trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx), number)
        if batches.fixed:
            return batches
    if not len(batches):
        raise MisconfigurationException("The training data loader is empty, so there is nothing to look at.")
    batches.fix(trainer)
    return batches
