"""`HessianSpectrum`: logs both ends of the Hessian's spectrum while any optimizer trains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_sfn.newton.operators import ProductMethod
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.spectrum import Spectrum, SpectrumSettings
from lightning_sfn.trainer.checks import misconfigured, require_count
from lightning_sfn.trainer.handover import note_rates
from lightning_sfn.trainer.messages import say
from lightning_sfn.trainer.misplaced import NamesMisplacedOptions
from lightning_sfn.trainer.pictures import log_histogram, log_picture, takes_pictures
from lightning_sfn.trainer.precision import widened_stand_ins
from lightning_sfn.trainer.probe import Probe, ProbeBatches, trained_names, warn_of_unregistered
from lightning_sfn.trainer.step_log import log_metrics
from lightning_sfn.trainer.support import SPECTRUM_BY_HAND, is_dry_run, require_replayable

__all__ = ["HessianSpectrum"]

_SIGNED_LOG_UNIT = 1e-4  # eigenvalues below this are shown on a linear, above it on a logarithmic scale
_SCALARS = ("lambda_min", "lambda_max", "negative_fraction", "gradient_norm", "residual_max", "loss", "products")


class HessianSpectrum(NamesMisplacedOptions, Callback):
    """Logs the Hessian's extreme eigenvalues on a fixed set of training batches, whatever the optimizer.

    It is the Hessian of the loss in the parameters that the optimizer trains; others are constants.
    The first ``num_batches`` training batches with a loss (or your own) are kept, with fixed random numbers, and every
    spectrum is taken on them, also after a resume. `training_step` is replayed in isolation, so a run with the callback
    is bit for bit the run without it. At the end it says in words what the spectrum means.

    Logged are ``hessian/lambda_min``, ``lambda_max``, ``negative_fraction``, ``gradient_norm``, ``residual_max``,
    ``loss``, ``products`` and, with a tolerance, ``converged``; the extreme Ritz values as
    ``hessian/eigenvalue/smallest_00`` (the outermost), ``smallest_01``, ..., ``largest_00``, ``largest_01``, ..., each
    with its error bound under ``hessian/residual/``. TensorBoard also gets the histograms ``hessian/eigenvalues`` and
    ``hessian/eigenvalues_signed_log`` (``sign(x) log10(1 + |x| / 1e-4)``, in which a small negative bulk stays visible
    beside large eigenvalues); loggers that take pictures get the Ritz values, the density, and the loss against the
    index over the run.

    Args:
        every_n_epochs: Take a spectrum at the end of every n-th training epoch, and at the end of the run. The default,
            if neither is given, is every epoch.
        every_n_steps: Take one after every n-th optimizer step instead, once all probe batches have been seen.
        krylov_dim: Lanczos vectors, each one Hessian-vector product; no more than there are parameters are used.
        num_batches: Training batches that the Hessian is averaged over, shared out over the devices.
        smallest: How many eigenvalues to log and to converge at the lower end, at most half of ``krylov_dim``.
        largest: How many at the upper end, likewise.
        tol: Lanczos is restarted until their residuals are below this share of each; ``None`` takes one basis.
        max_products: Hessian-vector products after which restarts end; four times ``krylov_dim`` if left out.
        density: Whether to estimate the spectral density as well.
        density_probes: Its random vectors, each ``krylov_dim`` more products.
        groups: Diagonal blocks to look at as well, by name: patterns of parameter names such as ``"encoder.*"``, logged
            under ``hessian_<name>/``.
        batches: Your own probe batches, in place of the first training batches: as a loader gives them, before hooks
            such as ``on_after_batch_transfer`` change them.
        curvature: ``"hessian"``, or ``"gauss_newton"`` (``training_step`` then returns ``"output"`` beside the loss;
            everything is logged under ``gauss_newton/``).
        hvp: How products are computed, as in `SaddleFreeNewton`.
        precision: 32 or 64 bits: the least precision of the computation, whatever the training precision. Tensors
            that a module keeps in lists and dictionaries of its own are not converted along, and nor are those that
            `training_step` converts itself (``.float()``).
        pictures_every: Draw the pictures at every n-th spectrum, and at the last; 0 for none.
        log: Whether to log; otherwise the spectra are kept in `history` alone, and no logger is needed.
        save_batches: Whether checkpoints hold the probe batches; without them a resumed run draws others.
        strict: Whether a spectrum that cannot be taken ends the run; otherwise it is a warning.

    Attributes:
        last: The last `Spectrum`; ``None`` before the first.
        history: Pairs of optimizer step and `Spectrum`, for all of the run.
        verdict: What the last spectrum means, in words; empty before the end of the run.

    Raises:
        MisconfigurationException: Both periods are given, or a value is out of its range.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        krylov_dim: int = 32,
        num_batches: int = 1,
        *,
        smallest: int = 3,
        largest: int = 3,
        tol: float | None = 1e-2,
        max_products: int | None = None,
        density: bool = False,
        density_probes: int = 4,
        groups: Mapping[str, str | Sequence[str]] | None = None,
        batches: Sequence[Any] | None = None,
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
        hvp: ProductMethod = "auto",
        precision: Literal[32, 64] = 32,
        pictures_every: int = 5,
        log: bool = True,
        save_batches: bool = True,
        strict: bool = False,
    ) -> None:
        if every_n_epochs is not None and every_n_steps is not None:
            raise MisconfigurationException(
                f"every_n_epochs is {every_n_epochs} and every_n_steps is {every_n_steps}, but only one of them can be "
                "given: leave one out."
            )
        if every_n_epochs is None and every_n_steps is None:
            every_n_epochs = 1
        require_count("every_n_epochs", every_n_epochs, otherwise=[None])
        require_count("every_n_steps", every_n_steps, otherwise=[None])
        require_count("density_probes", density_probes)
        require_count("pictures_every", pictures_every, 0)
        _require_batches(batches)
        with misconfigured():
            settings = SpectrumSettings(
                krylov_dim, smallest, largest, tol, max_products, density_probes if density else 0
            )
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.pictures_every, self.save_batches, self.strict = pictures_every, save_batches, strict
        self._logs = log  # not `log`: Lightning gives every callback the module's method of that name
        self.groups = _patterns_of(groups)
        self._probe = Probe(settings, curvature, hvp, precision)
        self._prefix = curvature
        self._given, self._num_batches = batches, num_batches
        self._start()

    def _start(self) -> None:
        self.last: Spectrum | None = None
        self.history: list[tuple[int, Spectrum]] = []
        self.verdict = ""
        self._batches = ProbeBatches(self._num_batches)
        self._saved_batches: list[Any] | None = None
        self._saved_count: int | None = None  # what num_batches was when they were drawn
        self._probed_at = -1
        self._probed_point: Tensor | None = None  # figures of the parameters at the last spectrum of this fit
        self._checked = self._warned = False
        self._missed = False  # whether the last try gave no spectrum

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, and starts afresh when the same object is used for another fit."""
        if stage != "fit":
            return
        require_replayable(trainer, pl_module, type(self).__name__, SPECTRUM_BY_HAND)
        if self._logs and not trainer.loggers and not is_dry_run(trainer):
            raise MisconfigurationException(
                "HessianSpectrum needs a logger, but the Trainer has none: pass logger=TensorBoardLogger(...), or "
                "HessianSpectrum(log=False) to keep the spectra in its `history` alone."
            )
        self._start()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the learning rates, before those of a checkpoint take their place."""
        note_rates(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses parameters whose curvature cannot be taken, before anything is spent."""
        try:
            if not any(map(is_lazy, pl_module.parameters())):  # the first batch initializes those
                FlatParameters(widened_stand_ins(pl_module))  # the dtypes of training do not matter here
        except ValueError as error:
            raise MisconfigurationException(f"HessianSpectrum: {error}") from error
        warn_of_unregistered(trainer, pl_module, type(self).__name__)
        for name, patterns in self.groups.items():
            self._names(trainer, pl_module, name, patterns)
        if self._given is not None:
            self._batches.share_out_loaded(trainer, pl_module, self._given)
        elif self._saved_batches is not None:
            self._batches.share_out(trainer, [tuple(arguments) for arguments in self._saved_batches])
            if self._saved_count not in (None, self._num_batches):
                rank_zero_info(
                    f"HessianSpectrum: num_batches is {self._num_batches} and was {self._saved_count}; the run goes on "
                    f"with the {self._batches.total} probe batch(es) of the checkpoint, so that all of its spectra are "
                    "of one function."
                )
        elif self.history:
            rank_zero_info("HessianSpectrum: the checkpoint holds no probe batches, so from here on they are others.")

    @staticmethod
    def _names(trainer: Trainer, module: LightningModule, group: str, patterns: Sequence[str]) -> list[str]:
        """The trainable parameters of a group."""
        trainable = trained_names(trainer, module)
        matched = [name for name in trainable if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not matched:
            given = " or ".join(map(repr, patterns)) or "empty"
            raise MisconfigurationException(
                f"HessianSpectrum: group {group!r} is {given}, which no trainable parameter matches: "
                f"the names are {', '.join(trainable[:8])}{', ...' if len(trainable) > 8 else ''}."
            )
        return matched

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Looks at the batch before the step may change it."""
        self._batches.hold(trainer, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the first batches of the run that have a loss; takes a spectrum at multiples of ``every_n_steps``."""
        if outputs or trainer.world_size > 1:  # several processes have to keep the same number at the same batch
            self._batches.keep(trainer)
        step = trainer.global_step
        due = self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0
        if due and self._batches.fixed and step != self._probed_at:
            self._take(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a spectrum at the end of every n-th epoch."""
        if not len(self._batches):
            return  # no batch of the epoch had a loss
        if not self._batches.fixed:
            self._batches.fix(trainer)  # the epoch has fewer batches than the probe wants
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            # Lightning logs what belongs to an epoch at the step before the next one.
            self._take(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the spectrum at the final parameters, if there is none yet, and says what it means."""
        if is_dry_run(trainer) or not len(self._batches) or trainer.global_step == 0:
            return
        place = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        # A step at the very end of an epoch that was cut short counts as none of its own.
        moved = self._probed_point is not None and not _are_same(self._probed_point, _figures(pl_module))
        if trainer.strategy.reduce_boolean_decision(moved or self._probed_at != trainer.global_step, all=False):
            self._take(trainer, pl_module, place)
        if self._missed or self.last is None:
            return
        if self.pictures_every and (len(self.history) - 1) % self.pictures_every:
            self._draw(trainer, place)
        try:
            self.verdict, _ = self._probe.verdict(trainer, pl_module, self._batches, self.last)
        except Exception as error:  # the user's step runs in it: anything can be raised
            self._give_up(trainer, error)
            return
        say(trainer, f"HessianSpectrum at step {trainer.global_step}: {self.verdict}")

    def _take(self, trainer: Trainer, module: LightningModule, place: int) -> None:
        """Takes and logs a spectrum; ``place`` is where loggers put it on their time axis."""
        self._probed_at = trainer.global_step
        try:
            self._probed_point = _figures(module)
            spectrum = self._probe.spectrum(trainer, module, self._batches, check=not self._checked)
            blocks = {}
            for name, patterns in self.groups.items():
                names = self._names(trainer, module, name, patterns)
                blocks[name] = self._probe.spectrum(trainer, module, self._batches, names=names)
            self._checked, self._missed, self.last = True, False, spectrum
            self.history.append((self._probed_at, spectrum))
        except Exception as error:  # the user's step runs in it: anything can be raised
            self._missed = True
            self._give_up(trainer, error)
            return
        try:
            self._publish(trainer, spectrum, blocks, place)
        except Exception as error:  # loggers and pictures: the spectrum is there
            self._give_up(trainer, error, "log")

    def _publish(self, trainer: Trainer, spectrum: Spectrum, blocks: dict[str, Spectrum], place: int) -> None:
        if self._logs:
            self._log(trainer, self._prefix, spectrum, place)
            for name, block in blocks.items():
                self._log(trainer, f"{self._prefix}_{name}", block, place)
        if self.pictures_every and (len(self.history) - 1) % self.pictures_every == 0:
            self._draw(trainer, place)

    def _give_up(self, trainer: Trainer, error: Exception, what: str = "take") -> None:
        """Warns once of what was impossible; with several processes a lonely failure must end all of them."""
        if self.strict or (trainer.world_size > 1 and not isinstance(error, FloatingPointError)):
            raise error
        if not self._warned:
            rank_zero_warn(
                f"HessianSpectrum could not {what} a spectrum at step {trainer.global_step}; training goes on without "
                f"it (strict=True ends it instead). {type(error).__name__}: {error}"
            )
        self._warned = True

    def _log(self, trainer: Trainer, prefix: str, spectrum: Spectrum, place: int) -> None:
        metrics = {f"{prefix}/{name}": float(getattr(spectrum, name)) for name in _SCALARS}
        ends = self._probe.settings.ends
        for name, value, bound in spectrum.extremes(ends.smallest, ends.largest):
            metrics |= {f"{prefix}/eigenvalue/{name}": value, f"{prefix}/residual/{name}": bound}
        if spectrum.converged is not None:
            metrics[f"{prefix}/converged"] = float(spectrum.converged)
        if spectrum.nonfinite:
            metrics[f"{prefix}/nonfinite"] = float(spectrum.nonfinite)
        if spectrum.density is not None:
            share, error = spectrum.density.below(0.0)
            metrics |= {
                f"{prefix}/density_negative_fraction": share,
                f"{prefix}/density_negative_fraction_error": error,
            }
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        log_metrics(trainer, metrics, place)
        for logger in trainer.loggers:
            if trainer.is_global_zero and len(spectrum.eigenvalues):
                log_histogram(logger, f"{prefix}/eigenvalues", spectrum.eigenvalues, place)
                log_histogram(logger, f"{prefix}/eigenvalues_signed_log", _signed_log(spectrum.eigenvalues), place)

    def _draw(self, trainer: Trainer, place: int) -> None:
        """Logs the pictures of the last spectrum and of the run so far."""
        loggers = [logger for logger in trainer.loggers if takes_pictures(logger)]
        spectrum = self.last
        if not (
            self._logs and loggers and trainer.is_global_zero and spectrum is not None and len(spectrum.eigenvalues)
        ):
            return
        if find_spec("matplotlib") is None:
            rank_zero_info('HessianSpectrum draws no pictures without matplotlib: pip install "lightning-sfn[plot]".')
            self.pictures_every = 0
            return
        from lightning_sfn.newton.figures import density_figure, index_figure, spectrum_figure

        drawn = [(step, kept) for step, kept in self.history if len(kept.eigenvalues)]
        pictures = {
            f"{self._prefix}/ritz_values": spectrum_figure(replace(spectrum, density=None), f"Step {self._probed_at}"),
            f"{self._prefix}/index_against_loss": index_figure(
                [step for step, _ in drawn], [kept for _, kept in drawn]
            ),
        }
        if spectrum.density is not None:
            pictures[f"{self._prefix}/density"] = density_figure(spectrum.density, f"Step {self._probed_at}")
        for logger in loggers:
            for tag, figure in pictures.items():
                log_picture(logger, tag, figure, place)

    @property
    def state_key(self) -> str:
        """Tells the two kinds of curvature apart in checkpoints, so that a Trainer can have both."""
        return self._generate_state_key(curvature=self._probe.curvature)

    def state_dict(self) -> dict[str, Any]:
        """The probe batches and the spectra so far."""
        return {
            "history": [(step, spectrum.to_dict()) for step, spectrum in self.history],
            "batches": self._batches.state() if self.save_batches and self._given is None else None,
            "num_batches": self._num_batches if self._saved_count is None else self._saved_count,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.history = [(step, Spectrum.from_dict(entries)) for step, entries in state_dict["history"]]
        if self.history:
            self._probed_at, self.last = self.history[-1]
        self._saved_batches = state_dict["batches"]
        self._saved_count = None if self._saved_batches is None else state_dict.get("num_batches")


def _require_batches(batches: Any) -> None:
    if batches is None:
        return
    if isinstance(batches, str) or not (hasattr(batches, "__len__") and hasattr(batches, "__iter__")):
        raise MisconfigurationException(f"batches is {batches!r}, but a list of batches is expected.")
    if len(batches) == 0:
        raise MisconfigurationException("batches is empty, but at least one batch is expected: leave it out.")


def _patterns_of(groups: Any) -> dict[str, list[str]]:
    """The patterns of each group, in a list."""
    given = groups if isinstance(groups, Mapping) else {} if groups is None else {"": None}
    patterns: dict[str, Any] = {name: [p] if isinstance(p, str) else p for name, p in given.items()}
    for several in patterns.values():
        if not (isinstance(several, Sequence) and all(isinstance(pattern, str) for pattern in several)):
            raise MisconfigurationException(
                f"groups is {groups!r}, but a dictionary of patterns by name is expected, such as "
                "{'encoder': 'encoder.*'}."
            )
    return {name: list(several) for name, several in patterns.items()}


def _figures(module: LightningModule) -> Tensor:
    """Sums and norms of the parameters, float64, on the CPU: a step that changes parameters changes these."""
    figures = []
    for p in (p.detach() for p in module.parameters() if p.requires_grad):
        dtype = torch.promote_types(p.dtype, torch.float32)
        figures += [p.sum(dtype=dtype).double(), torch.linalg.vector_norm(p, dtype=dtype).double()]
    return torch.stack(figures).cpu() if figures else torch.empty(0, dtype=torch.float64)


def _are_same(figures: Tensor, others: Tensor) -> bool:
    """Whether two lists of figures are equal; parameters that are NaN stay what they are."""
    return figures.shape == others.shape and torch.allclose(figures, others, rtol=0.0, atol=0.0, equal_nan=True)


def _signed_log(values: Tensor) -> Tensor:
    return values.sign() * torch.log10(1 + values.abs() / _SIGNED_LOG_UNIT)
