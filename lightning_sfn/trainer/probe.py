"""The probe: the batches on which every spectrum of a run is taken, and spectra taken on them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sfn.newton.objective import Closure, Objective
from lightning_sfn.newton.operators import CurvatureName, ProductMethod, check_curvature, make_operator
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import ProcessMean
from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.newton.spectrum import Spectrum, SpectrumSettings, spectrum_of
from lightning_sfn.newton.verdict import NewtonTrial, try_newton_step, verdict
from lightning_sfn.trainer.batches import cases_of
from lightning_sfn.trainer.checks import misconfigured, require_choice, require_count
from lightning_sfn.trainer.handover import coupled_decay, resting_groups
from lightning_sfn.trainer.held_state import HeldState
from lightning_sfn.trainer.kept_steps import is_plain
from lightning_sfn.trainer.own_writes import ParameterCopies, foreseen
from lightning_sfn.trainer.precision import cast, curvature_dtype, in_precision
from lightning_sfn.trainer.recording import RecordedStep, own_copies, step_arguments, training_batch
from lightning_sfn.trainer.replay import processes_of, replay_closure, require_repeatable
from lightning_sfn.trainer.support import require_curvature

__all__ = ["Probe", "ProbeBatches", "trained_names", "warn_of_unregistered"]


class ProbeBatches:
    """The training batches of a probe: drawn once, the same for the whole run and after a resume.

    With several processes each holds its share, and the checkpoint holds all of them, so that a run may be resumed on
    another number of processes.

    Args:
        count: Batches wanted, over all processes.

    Raises:
        MisconfigurationException: The count is no positive number.
    """

    def __init__(self, count: int) -> None:
        require_count("num_batches", count)
        self.count = count
        self.fixed = False
        self._own: list[tuple[Any, ...]] = []  # arguments of training_step, on this process' device
        self._held: tuple[Any, ...] | None = None  # those of a batch of which it is not known whether it has a loss
        self._all: list[tuple[Any, ...]] = []  # those of all processes, on the CPU

    def __len__(self) -> int:
        """Batches that this process holds."""
        return len(self._own)

    @property
    def total(self) -> int:
        """Batches that all processes hold, once they are fixed."""
        return len(self._all)

    def hold(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Copies a batch on the device, which the step that follows may change in place, until `keep` or another."""
        self._held = None if self.fixed else own_copies(step_arguments(trainer, batch, batch_idx))

    def keep(self, trainer: Trainer) -> None:
        """Keeps the batch that is held, if this process' share is not complete yet."""
        if self._held is None:
            return
        self._own.append(self._held)
        self._held = None
        if len(self._own) * trainer.world_size >= self.count:
            self.fix(trainer)

    def fix(self, trainer: Trainer) -> None:
        """Ends the collection; every process has to call it at the same batch."""
        self.fixed = True
        held = _to(self._own, torch.device("cpu"))
        processes = processes_of(trainer)
        shares = [held] if processes is None else processes.collect(held)
        self._all = [arguments for share in shares for arguments in share]

    def share_out_loaded(self, trainer: Trainer, module: LightningModule, batches: Iterable[Any]) -> None:
        """Takes batches as a loader gives them to every process, of which each keeps its share.

        They go through the hooks by which the module or the data module changes batches. The run does not notice: what
        loader and hooks draw, count or keep in the module is put back.

        Args:
            trainer: The Trainer.
            module: The module.
            batches: The batches.
        """

        def prepare(batch: Any, number: int) -> tuple[Any, ...]:
            # Of a copy, which hooks may change in place.
            return step_arguments(trainer, training_batch(trainer, module, own_copies(batch)), number)

        held = HeldState(module)
        held.stand_in()
        try:
            with RandomState.seeded(0, module.device).replayed():
                self.share_out(trainer, [(batch, number) for number, batch in enumerate(batches)], prepare)
        finally:
            held.restore()

    def share_out(
        self,
        trainer: Trainer,
        batches: Sequence[tuple[Any, ...]],
        prepare: Callable[..., tuple[Any, ...]] = lambda *arguments: arguments,
    ) -> None:
        """Takes batches that every process has, of which each keeps its share.

        Args:
            trainer: The Trainer.
            batches: Positional arguments of ``prepare``, for each batch.
            prepare: Makes those of `training_step` from them.

        Raises:
            MisconfigurationException: There are fewer batches than processes.
        """
        if len(batches) < trainer.world_size:
            raise MisconfigurationException(
                f"The probe has {len(batches)} batches, but each of the {trainer.world_size} processes needs at least "
                "one: give more batches."
            )
        mine = [prepare(*batch) for batch in batches[trainer.global_rank :: trainer.world_size]]
        self._own, self._all, self.fixed = _to(mine, trainer.strategy.root_device), list(batches), True

    def state(self) -> list[Any] | None:
        """All batches; ``None`` if they are not known yet, or are of types that a checkpoint cannot hold."""
        return self._all if self.fixed and is_plain(self._all) else None

    def objective(
        self, trainer: Trainer, module: LightningModule, dtype: torch.dtype, *, with_output: bool = False
    ) -> Objective:
        """The mean loss over the batches of all processes, as one fixed function.

        Args:
            trainer: The Trainer.
            module: The module.
            dtype: What real tensors of the batches are converted to.
            with_output: Whether losses come with the model output, for the Gauss-Newton matrix.

        Returns:
            The objective; every case counts the same, on whatever process it lies.
        """
        steps = [
            RecordedStep(cast(arguments, dtype), {}, RandomState.seeded(number, module.device), None)
            for number, arguments in enumerate(self._own)
        ]
        cases = [cases_of(step) for step in steps]

        def closure(step: RecordedStep) -> Closure:
            def fresh() -> Any:  # of a copy, since the step may change its batch in place
                copy = replace(step, args=own_copies(step.args))
                return replay_closure(trainer, module, copy, with_output=with_output, dtype=dtype)()

            return fresh

        return Objective(
            [closure(step) for step in steps],
            cases,
            random_states=[step.random_state for step in steps],
            reduce=_mean_over_cases(trainer, sum(cases)),
        )


@dataclass(frozen=True)
class Probe:
    """How spectra are taken on probe batches.

    Attributes:
        settings: What is asked of a spectrum.
        curvature: ``"hessian"`` or ``"gauss_newton"``.
        hvp: How products are computed.
        bits: 32 or 64: the least precision of the computation.

    Raises:
        MisconfigurationException: The curvature or the precision is another one, or ``hvp`` does not go with it.
    """

    settings: SpectrumSettings
    curvature: CurvatureName = "hessian"
    hvp: ProductMethod = "auto"
    bits: int = 32

    def __post_init__(self) -> None:
        require_choice("precision", self.bits, (32, 64))
        require_curvature(self.curvature, "A spectrum")
        with misconfigured():
            check_curvature(self.curvature, self.hvp)

    def spectrum(
        self,
        trainer: Trainer,
        module: LightningModule,
        batches: ProbeBatches,
        *,
        names: Sequence[str] | None = None,
        check: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Spectrum:
        """Takes a spectrum at the module's present parameters.

        Args:
            trainer: The Trainer.
            module: The module; nothing about it is changed.
            batches: The probe batches.
            names: Parameters whose diagonal block is looked at; all that are trained if left out.
            check: Whether to make sure first that the loss is a fixed function.
            progress: Called after each product with the products so far and the most there can be.

        Returns:
            The spectrum.
        """

        def take() -> Spectrum:
            with self._posed(trainer, module, batches, names) as (objective, parameters):
                value = objective.value() if check else math.nan
                if math.isfinite(value):  # else the spectrum counts what is not
                    require_repeatable(objective, value)
                operator = make_operator(objective, parameters, self.curvature, self.hvp)
                return spectrum_of(operator, self.settings, progress=progress)

        return foreseen(trainer, take)

    def verdict(
        self, trainer: Trainer, module: LightningModule, batches: ProbeBatches, spectrum: Spectrum
    ) -> tuple[str, NewtonTrial | None]:
        """What a spectrum means, with one SFN step tried on the probe batches and taken back.

        Args:
            trainer: The Trainer.
            module: The module; its parameters are bit for bit what they were afterwards.
            batches: The probe batches.
            spectrum: The spectrum at the module's present parameters.

        Returns:
            The verdict in words, and the step; ``None`` where the spectrum is not finite or not the Hessian's.
        """
        if self.curvature != "hessian":
            return (
                f"curvature={self.curvature!r} cannot tell a saddle from a minimum: use 'hessian' for that.",
                None,
            )
        if spectrum.nonfinite:
            return verdict(spectrum), None

        def attempt() -> NewtonTrial:
            with self._posed(trainer, module, batches) as (objective, parameters):
                return try_newton_step(objective, parameters)

        trial = foreseen(trainer, attempt)
        return verdict(spectrum, trial) + _about_penalty(trainer), trial

    @contextmanager
    def _posed(
        self, trainer: Trainer, module: LightningModule, batches: ProbeBatches, names: Sequence[str] | None = None
    ) -> Iterator[tuple[Objective, FlatParameters]]:
        """The mean loss over the probe batches, and the parameters, in the precision of the computation."""
        dtype = curvature_dtype(module, self.bits)
        wanted = set(trained_names(trainer, module) if names is None else names)  # not of copies in another precision
        with ParameterCopies(module), in_precision(module, dtype):
            parameters = FlatParameters(p for name, p in module.named_parameters() if name in wanted)
            yield batches.objective(trainer, module, dtype, with_output=self.curvature != "hessian"), parameters


def trained_names(trainer: Trainer, module: LightningModule) -> list[str]:
    """The parameters that are trained, by name: those of the optimizers, where there are any."""
    trained = {id(p) for p in _trained(trainer)}
    trainable = {name: id(p) for name, p in module.named_parameters() if p.requires_grad}
    return [name for name, key in trainable.items() if key in trained] or list(trainable)


def warn_of_unregistered(trainer: Trainer, module: LightningModule, who: str) -> None:
    """Warns of parameters that the optimizers train and that the module does not know, which spectra leave out."""
    known = {id(p) for p in module.parameters()}
    if others := sum(p.requires_grad and id(p) not in known for p in _trained(trainer)):
        rank_zero_warn(
            f"{who} takes {others} parameter(s) for constants that an optimizer trains, because "
            f"{type(module).__name__} has not registered them: keep modules in nn.ModuleList or nn.ModuleDict, and "
            "parameters in nn.ParameterList, in place of plain lists and dictionaries."
        )


def _trained(trainer: Trainer) -> Iterator[Tensor]:
    """What the optimizers train."""
    for optimizer in trainer.optimizers:
        for group, rests in zip(optimizer.param_groups, resting_groups(optimizer), strict=True):
            if not rests:
                yield from group["params"]


def _about_penalty(trainer: Trainer) -> str:
    """A sentence where what is trained is more than the loss that a spectrum is of."""
    pairs = [pair for optimizer in trainer.optimizers for pair in coupled_decay(optimizer)]
    decays = {decay for tensors, decay in pairs if tensors and decay}
    if not decays:
        return ""
    return f" That is the loss alone: the optimizer adds weight decay ({', '.join(f'{d:g}' for d in sorted(decays))})."


def _mean_over_cases(trainer: Trainer, cases: float) -> ProcessMean | None:
    """The mean over processes, each weighted by its number of cases."""
    processes = processes_of(trainer)
    if processes is None:
        return None
    return ProcessMean(processes, cases / float(processes.sum(torch.tensor(cases, dtype=torch.float64))))


def _to(value: Any, device: torch.device) -> Any:
    return apply_to_collection(value, Tensor, lambda tensor: tensor.to(device))
