"""A Trainer that can also look at a checkpoint: ``trainer.spectrum(model, datamodule, ckpt_path=...)``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from tqdm import tqdm

from lightning_sfn.newton.operators import ProductMethod
from lightning_sfn.newton.spectrum import Spectrum, SpectrumSettings
from lightning_sfn.newton.verdict import NewtonTrial
from lightning_sfn.trainer.checks import require_count
from lightning_sfn.trainer.probe import Probe, ProbeBatches, trained_names, warn_of_unregistered
from lightning_sfn.trainer.recording import training_batch
from lightning_sfn.trainer.support import SPECTRUM_BY_HAND, require_replayable

__all__ = ["InspectingTrainer", "OptionError"]

_PICTURES = (".png", ".pdf", ".svg")


class OptionError(MisconfigurationException):
    """An option's value is out of its range, whatever the checkpoint and the data are."""


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
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
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
            OptionError: A value is out of its range.
            MisconfigurationException: A file exists, or the checkpoint is not the model's.
        """
        try:
            require_count("density_probes", density_probes)
            settings = SpectrumSettings(krylov_dim, smallest, largest, tol, max_products, density_probes * density)
            probe, batches = Probe(settings, curvature, hvp, precision), ProbeBatches(num_batches)
        except (ValueError, MisconfigurationException) as error:
            raise OptionError(str(error)) from error
        for path in (output, plot):
            _require_writable(path, overwrite)
        _require_drawable(plot)
        inspection = _Inspection(probe, batches, ckpt_path, output, plot)
        with self._only_starting(inspection):
            self.fit(model, train_dataloaders, datamodule=datamodule)
        self.verdict = inspection.verdict
        return inspection.spectrum

    @contextmanager
    def _only_starting(self, inspection: Callback) -> Iterator[None]:
        """Lets a fit in the body set everything up and end before its first batch; undone afterwards."""
        loop = self.fit_loop
        progress = loop.epoch_progress.current
        changes: list[tuple[Any, dict[str, Any]]] = [
            (self, {"callbacks": [inspection], "loggers": [], "num_sanity_val_steps": 0, "limit_val_batches": 0}),
            (loop, {"min_epochs": None, "max_epochs": max(loop.max_epochs or 1, 1)}),
            (loop.epoch_loop, {"min_steps": None, "max_steps": -1}),
            (progress, {"processed": 0, "completed": 0}),
        ]
        before = [(owner, {name: getattr(owner, name) for name in values}) for owner, values in changes]
        _set(changes)
        try:
            yield
        finally:
            _set(before)


class _Inspection(Callback):
    """Takes one spectrum where training would start, and stops there."""

    def __init__(
        self, probe: Probe, batches: ProbeBatches, ckpt_path: str | None, output: str | None, plot: str | None
    ) -> None:
        self._probe, self._batches, self._ckpt_path = probe, batches, ckpt_path
        self._output, self._plot = output, plot
        self.spectrum: Spectrum | None = None
        self.verdict = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work."""
        require_replayable(trainer, pl_module, "A spectrum", SPECTRUM_BY_HAND)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the parameters, draws the batches, takes the spectrum and stops."""
        trainer.should_stop = True
        if self._ckpt_path is None:
            rank_zero_info("No checkpoint is given (--ckpt_path), so this is the spectrum of the module as made.")
        else:
            _load_parameters(trainer, pl_module, self._ckpt_path)
        warn_of_unregistered(trainer, pl_module, "A spectrum")
        batches = self._batches
        _draw(trainer, pl_module, batches)
        if batches.total < batches.count:
            rank_zero_info(
                f"num_batches is {batches.count}, but the data loader gives {batches.total}: the spectrum is of those."
            )
        trained = map(pl_module.get_parameter, trained_names(trainer, pl_module))
        at_most = self._probe.settings.most_products(sum(p.numel() for p in trained))
        with tqdm(
            total=at_most, desc="Hessian-vector products (at most)", disable=not trainer.is_global_zero, leave=False
        ) as bar:
            self.spectrum = self._probe.spectrum(
                trainer, pl_module, batches, check=True, progress=lambda done, _: bar.update(done - bar.n)
            )
        self.verdict, trial = self._probe.verdict(trainer, pl_module, batches, self.spectrum)
        if trainer.is_global_zero:
            self._write(self.spectrum, trial)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where there was no batch, for then training does not start."""
        if self.spectrum is None:
            raise MisconfigurationException("The training data loader is empty, so there is nothing to look at.")

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
                num_batches=self._batches.total,
                **decrease,
            )
        if self._plot is not None:
            spectrum.plot().savefig(self._plot, dpi=120)


def _set(values: list[tuple[Any, dict[str, Any]]]) -> None:
    for owner, attributes in values:
        for name, value in attributes.items():
            setattr(owner, name, value)


def _require_writable(path: str | None, overwrite: bool) -> None:
    if path is None:
        return
    if os.path.exists(path) and not overwrite:
        raise MisconfigurationException(f"{path} exists: choose another name, or replace it with overwrite=True.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _require_drawable(path: str | None) -> None:
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise MisconfigurationException('A plot needs matplotlib, which is missing: pip install "lightning-sfn[plot]".')
    if Path(path).suffix not in _PICTURES:
        raise OptionError(f"plot is {path}, but a name that ends in {', '.join(_PICTURES)} is expected.")


def _load_parameters(trainer: Trainer, module: LightningModule, path: str) -> None:
    """Loads a checkpoint's parameters and buffers, and the epoch that it was written in; nothing else."""
    if not os.path.exists(path):
        raise MisconfigurationException(f"There is no checkpoint {path}: give the path of an existing one.")
    reason = "it has no state_dict"
    try:
        checkpoint: Any = trainer.strategy.load_checkpoint(path)
    except Exception as error:  # whatever unpickling makes of a file that is none
        checkpoint, reason = None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict)):
        raise MisconfigurationException(
            f"{path} is not a checkpoint that Lightning wrote ({reason}): give one that trainer.save_checkpoint or "
            "ModelCheckpoint made."
        )
    module.on_load_checkpoint(checkpoint)
    try:
        trainer.strategy.load_model_state_dict(checkpoint)
    except RuntimeError as error:
        difference = " ".join(str(error).split())[:300]
        raise MisconfigurationException(
            f"{path} does not fit {type(module).__name__}: build the model with the options that it was trained with. "
            f"({difference})"
        ) from error
    trainer.fit_loop.epoch_progress.current.completed = checkpoint.get("epoch", 0)


def _draw(trainer: Trainer, module: LightningModule, batches: ProbeBatches) -> None:
    """Collects the first training batches, on the device."""
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    for batch, number, dataloader_idx in loader:
        batches.hold(trainer, training_batch(trainer, module, batch, dataloader_idx), number)
        batches.keep(trainer)
        if batches.fixed:
            return
    if not len(batches):
        raise MisconfigurationException("The training data loader is empty, so there is nothing to look at.")
    batches.fix(trainer)
