"""Data windows: from loader batches, one at a time, to the three objectives of a Newton step.

A fresh mini-batch for everything does not escape a saddle: each batch has a saddle of its own. So the gradient is
accumulated over a window of loader batches, as Lightning's closure delivers them; Hessian-vector products see a small
part of that window, and trial losses another. On a plateau small parts are not enough: the curvature of a part has
negative directions of its own, larger than those of the whole. So the parts grow where steps achieve little, up to the
whole window, and shrink again where they do well.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_sfn.newton.objective import Objective, ObjectiveError
from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import ProcessMean
from lightning_sfn.newton.shortage import is_out_of_memory
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.batches import Batches, BatchWeights, cases_of
from lightning_sfn.trainer.budgets import DataBudgets
from lightning_sfn.trainer.extent import Extent
from lightning_sfn.trainer.gradient_edits import warn_if_edited
from lightning_sfn.trainer.isolation import Isolation, rounds_otherwise
from lightning_sfn.trainer.messages import say
from lightning_sfn.trainer.own_writes import moves_a_teacher, refusing_writes
from lightning_sfn.trainer.recording import RecordedStep, StepRecorder
from lightning_sfn.trainer.replay import evaluate, processes_of, require_repeatable

__all__ = ["WindowedNewton"]

_SLOW = 1e-4  # relative decrease of the loss below which a step counts as stuck on a plateau
_STUCK = 5  # Newton steps in a row of which none was taken, after which a message says what that may mean
_ROUNDING = 1e-5  # relative difference of a loss and its replay that other kernels explain


class WindowedNewton:
    """Takes over `SaddleFreeNewton.step` inside Lightning's loop (a `Driver`).

    Each call runs Lightning's closure once, so logging, hooks and accumulation are Lightning's own. When the window is
    complete, one Newton step is taken on it; everything beyond the gradient comes from isolated replays. Gradients
    enter the window before Lightning clips them (`note_gradient`). A batch whose loss or gradient is not finite is left
    out of its window.

    Where the loss depends on what changes from batch to batch (a step count, a buffer, a hidden state), each batch was
    recorded under another state, but all replays see that of the window's end. There the recorded loss is no baseline
    for trial losses, and loss and gradient are evaluated anew, for one more pass over the window.

    Args:
        trainer: The Trainer.
        module: The module.
        optimizer: The optimizer that now belongs to the Trainer.
        budgets: How much data each ingredient sees, and what each batch counts.
        weight_decay: Pairs of parameters and weight decay; the penalty becomes part of the objective.
        before_step: Called before each Newton step, when its objectives are known.
        on_step: Called with the record of each Newton step.
        on_failure: Called with the error where a step was impossible (a number that is not finite, or no memory left
            even after saving); the parameters are then as they were. Without it the error is raised.

    Attributes:
        steps_taken: Newton steps so far, failed ones included.
        batch_gradients: Gradients of single batches so far, Lightning's own included.
        growth: Present factor on the shares of the window that curvature and trials see.
        last_curvature: The objective that the products of the last (or coming) step see.
        whole_trials: Whether the trial losses of the last (or coming) step are those of the objective itself.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: SaddleFreeNewton,
        budgets: DataBudgets,
        *,
        weight_decay: Sequence[tuple[Sequence[Tensor], float]] = (),
        before_step: Callable[[], None] = lambda: None,
        on_step: Callable[[StepRecord], None],
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self._trainer, self._module, self._optimizer, self._budgets = trainer, module, optimizer, budgets
        self._decay = [(list(tensors), decay) for tensors, decay in weight_decay if decay]
        self._before_step, self._on_step, self._on_failure = before_step, on_step, on_failure
        self._processes = optimizer.processes = processes_of(trainer)
        self._recorder = StepRecorder(trainer, module.device)
        self._window = Batches()
        self._held: Batches | None = None
        self._extent = Extent(trainer, budgets)
        self._unfinished = 0  # batches of the step that is being taken
        self._isolation: Isolation | None = None
        self.steps_taken = 0
        self.batch_gradients = 0
        self.growth = 1.0
        self._replays_all = False  # whether replays have shown another loss than the one that was recorded
        self._unclipped: Tensor | None = None
        self._after_backward: Tensor | None = None
        self._compared = False  # whether it has been seen, once, if hooks change it
        self._trained: list[int] | None = None  # identities of the parameters that the last batch trained
        self._warned = self._warned_of_layers = self._told_of_rejections = self._told_of_rest = False
        self._rejected = 0  # Newton steps since the last one that was taken
        self._last_step: tuple[float, float, bool] | None = None  # loss before, promised decrease, accepted
        self.last_curvature: Objective | None = None
        self.whole_trials = False

    @property
    def has_penalty(self) -> bool:
        """Whether weight decay is part of the objective."""
        return bool(self._decay)

    @property
    def idle(self) -> bool:
        """Whether no batch waits for a step."""
        return not self._window.steps

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Runs Lightning's closure; takes a Newton step if it completes the window.

        Args:
            closure: Lightning's closure. A gradient scaler has run it already, and passes none.

        Returns:
            What the closure returned.
        """
        result = closure() if closure is not None else None
        recorded = self._taken()
        if self._trainer.fit_loop._skip_backward:
            return result  # weight averaging passes over the data for batch norm's statistics alone
        self.batch_gradients += len(recorded)
        if self._held is not None:
            self._newton_step(self._held, None)
        else:
            if recorded:
                self._add(recorded)
            if self._extent.is_complete:
                self.end_window()
        return result

    def watch(self) -> Objective | None:
        """Collects the batches of a step that another optimizer took.

        Returns:
            The mean loss of the window, where this step completed it, and it was a whole one.
        """
        recorded = self._taken()
        if recorded:
            self._collect(recorded)
        if not self._extent.is_complete:
            return None
        whole = bool(self._window.steps) and self._is_whole()
        window = self._cut()
        return self._objective(window, range(len(window.steps))) if whole else None

    def note_backward(self) -> None:
        """Keeps the gradient that `backward` has just made, to see once whether hooks change it."""
        # A gradient scaler divides it by its scale afterwards; a held window asks for no more gradients.
        scaled = getattr(self._trainer.precision_plugin, "scaler", None) is not None
        if not (self._compared or scaled or self._held is not None):
            self._after_backward = self._parameters().gradients()

    def note_gradient(self) -> None:
        """Keeps the gradient that Lightning is about to clip: secants and trial losses need the objective's own."""
        self._unclipped = self._parameters().gradients()

    def end_window(self) -> None:
        """Takes the step of a window, if there is one: it is complete, or a hook has ended its epoch unannounced.

        What is left over where a run is cut short, or where SFN took over inside an epoch, is let go if it has less
        than half of a window's batches: a step that few cases decide about would harm all others.
        """
        if not self._window.steps:
            self._cut()
            return
        whole, enough = self._is_whole(), self._extent.is_enough(len(self._window.steps))
        window = self._cut()
        if not enough:
            self._tell_of_rest(len(window.steps))
            return
        if whole and self._budgets.hold:
            self._held = window
        self._unfinished = len(window.steps)
        self._newton_step(window, self._loss_and_gradient(window))
        self._unfinished = 0

    def note_epoch_end(self) -> None:
        """A hook has ended the epoch, perhaps unannounced: the window that waits gets no more batches."""
        self._extent.note_epoch_end()

    def drop(self) -> None:
        """Forgets the batches that wait: a window never crosses the end of an epoch."""
        self._recorder.take()
        self._cut()

    def _taken(self) -> list[RecordedStep]:
        """The batches since the last call that have a loss."""
        recorded = self._recorder.take()
        # Some optimizers evaluate a batch several times, and a skipped step leaves its batches behind.
        self._offer(min(len(recorded), self._extent.accumulated))
        return [step for step in recorded if step.loss is not None]

    def _offer(self, count: int) -> None:
        """Counts batches for the window, whatever becomes of them."""
        self._extent.offered += count if self._held is None else 0

    def _cut(self) -> Batches:
        """The window as it is; the next one begins behind it."""
        window, self._window = self._window, Batches()
        self._extent.begin()
        return window

    def _is_whole(self) -> bool:
        """Whether a window that is complete holds what it shall, and few of its batches were left out."""
        return self._extent.is_whole and self._extent.is_enough(len(self._window.steps))

    def _tell_of_rest(self, count: int) -> None:
        if not self._told_of_rest:
            self._told_of_rest = True
            say(
                self._trainer,
                f"No Newton step was taken on the last {count} batch(es), since a window has more than twice as many "
                "and was cut short: what few cases say would harm all others.",
            )

    def detach(self, *, keep: bool = False) -> None:
        """Gives Lightning's `training_step` and the optimizer's `step` back, and the memory that held the window.

        Args:
            keep: Whether the batches that wait stay, for a checkpoint of an interrupted run.
        """
        self._recorder.detach()
        self._optimizer.attach(None)
        self.last_curvature = None
        if not keep:
            self._window, self._held = Batches(), None

    def _collect(self, recorded: Sequence[RecordedStep]) -> None:
        """Adds batches without their gradients to the window."""
        finite = all(bool(torch.isfinite(step.loss).all()) for step in recorded if step.loss is not None)
        weights = self._admit(recorded, finite=finite)
        if weights is not None:
            self._window.collect(recorded, weights)

    def _add(self, recorded: Sequence[RecordedStep]) -> None:
        """Adds the batches of one optimizer step, whose mean gradient lies in ``.grad``, to the window."""
        # Lightning's mean over accumulated batches is unweighted, whatever their sizes: the objective must be the same.
        # A gradient scaler that skipped a step left its batches behind: only the last ones made this gradient.
        recorded = recorded[-self._trainer.accumulate_grad_batches :]
        unclipped, self._unclipped = self._unclipped, None
        parameters = self._parameters()
        given = parameters.gradients() if unclipped is None else unclipped
        # Lightning divides by the nominal number of accumulated batches, also where an epoch ends before it is reached.
        gradient = given * (self._trainer.accumulate_grad_batches / len(recorded))
        loss = sum(float(step.loss) for step in recorded if step.loss is not None) / len(recorded)
        finite = math.isfinite(loss) and bool(torch.isfinite(gradient).all())
        weights = self._admit(recorded, finite=finite)
        if weights is None:
            return
        if self._after_backward is not None:
            warn_if_edited(self._after_backward, given)
            self._after_backward, self._compared = None, True
        before, self._trained = self._trained, [id(p) for p in parameters.tensors]
        if self._window.gradient is not None and (
            self._window.gradient.numel() != gradient.numel() or before not in (None, self._trained)
        ):
            self._drop_window(len(recorded))
        self._window.add(recorded, weights, loss, gradient)

    def _drop_window(self, count: int) -> None:
        """Forgets the batches of a window, whose gradients are of other parameters than those that are trained now.

        Args:
            count: Batches that begin a new one.
        """
        if not self._warned_of_layers:
            rank_zero_warn(
                f"{len(self._window.steps)} batch(es) that waited for a Newton step are left out, since other "
                f"parameters are trained from batch {self._trainer.fit_loop.epoch_loop.batch_idx} on (requires_grad "
                "has changed). So it goes wherever that happens inside a window, and steps see fewer batches, or are "
                "not taken where less than half of a window is left: freeze and free layers at the start of an epoch."
            )
            self._warned_of_layers = True
        self._cut()
        self._offer(count)

    def _admit(self, recorded: Sequence[RecordedStep], *, finite: bool) -> BatchWeights | None:
        """Weights of some batches; none, and a warning once, where a process saw a number that is not finite."""
        weights = self._weigh(recorded, finite=finite)
        if not math.isnan(weights.mean):
            return weights
        if not self._warned:
            rank_zero_warn(
                f"Loss or gradient of batch {self._trainer.fit_loop.epoch_loop.batch_idx} is not finite (loss "
                f"{[float(step.loss) for step in recorded if step.loss is not None]}): such batches are left out of "
                "Newton steps from now on. Look for what causes it."
            )
            self._warned = True
        return None

    def _weigh(self, recorded: Sequence[RecordedStep], *, finite: bool) -> BatchWeights:
        """Weights of some batches. A process that saw a number that is not finite tells all others by a NaN."""
        cases = [cases_of(step) if finite else math.nan for step in recorded]
        totals, squares = self._sum([*cases, *(size**2 for size in cases)]).view(2, -1)
        batches = len(cases) * self._count
        mean = float(totals.sum()) / batches
        if self._budgets.reduction == "samples":
            even = batches * float(squares.sum()) == float(totals.sum()) ** 2
            return BatchWeights(cases, totals.tolist(), mean, even)
        # Gradients are averaged over processes and batches without weights.
        return BatchWeights([mean] * len(cases), [mean * self._count] * len(cases), mean, True)

    def _loss_and_gradient(self, window: Batches) -> tuple[float, Tensor] | None:
        """Mean loss and gradient of a window over all processes, weight decay included, where Lightning gave them."""
        if not window.even or self._replays_all or moves_a_teacher(self._module):
            return None  # each batch has had a state or a teacher of its own, but replays have the present one
        total = sum(window.weights)
        assert window.gradient is not None
        mean = self._mean(range(len(window.steps)), window)
        loss = torch.tensor(window.loss / total, dtype=torch.float64)
        whole = float(loss if mean is None else mean(loss))
        gradient = window.gradient / total  # the strategy averaged it over the processes
        return self._with_decay(whole, gradient) if self._decay else (whole, gradient)

    def _newton_step(self, window: Batches, known: tuple[float, Tensor] | None) -> None:
        everything = range(len(window.steps))
        self._adapt(None if known is None else known[0])
        generator = torch.Generator().manual_seed(self.steps_taken)
        curvature, trial = self._budgets.choose(len(everything), self.growth, generator)
        objective = self._objective(window, everything)
        self.last_curvature = objective if len(curvature) == len(everything) else self._objective(window, curvature)
        # Trial losses are replays: a loss that training rounded in another way is none that they are compared with.
        rounded = known is not None and rounds_otherwise(self._trainer, self._module)
        self.whole_trials = len(trial) == len(everything) and not rounded
        trial_objective = objective if self.whole_trials else self._objective(window, trial)
        self.steps_taken += 1
        doubtful = self._last_step is None
        self._last_step = None
        try:
            with self.session():
                if doubtful and not rounded:
                    known = self._confirmed(known, objective)
                self._before_step()
                record, known = self._step_on(objective, trial_objective, known)
        except Exception as error:
            if self._on_failure is None or not _is_survivable(error, self._trainer):
                raise
            self._on_failure(error)
            return
        self._last_step = (record.loss_before, record.loss_before - record.loss_after, record.accepted)
        self._note_rejection(record)
        own_gradients = record.gradients - (known is not None)
        self.batch_gradients += own_gradients * len(window.steps)
        beside_trials = record.gradients - record.secant_gradients if record.kind == "subspace" else 0  # see TrialLoss
        self.batch_gradients += 0 if self.whole_trials else beside_trials * len(trial)
        self._on_step(record)

    def _note_rejection(self, record: StepRecord) -> None:
        """Tells once of a run of steps that are not taken: what lowers no loss is no gradient, or it is a minimum."""
        self._rejected = 0 if record.accepted else self._rejected + 1
        if self._rejected == _STUCK and not self._told_of_rejections:
            self._told_of_rejections = True
            say(
                self._trainer,
                f"None of the last {_STUCK} Newton steps was taken, because none lowered the loss, which is "
                f"{record.loss_before:.6g} with a gradient norm of {record.gradient_norm:.3g}: either this is a "
                "minimum, or backward gives something else than the gradient (gradient reversal, straight-through "
                "estimators), and then the first optimizer has to train.",
            )

    def _step_on(
        self, objective: Objective, trial: Objective, known: tuple[float, Tensor] | None
    ) -> tuple[StepRecord, tuple[float, Tensor] | None]:
        """The optimizer's step; gives with its record what of the recorded loss and gradient was of use."""

        def step() -> StepRecord:
            return self._optimizer.step_on(
                objective,
                curvature=self.last_curvature,
                trial=trial,
                loss_and_gradient=known,
                # Other windows hold other cases or other random numbers: there the losses tell.
                same_function=True if self._held is not None and not moves_a_teacher(self._module) else None,
            )

        try:
            return step(), known
        except ObjectiveError:
            # Trial losses were compared with the recorded loss, which was confirmed in an earlier window at best.
            if trial is not objective or known is None or self._confirmed(known, objective) is not None:
                raise
            require_repeatable(objective, objective.value())  # a loss that changes by itself is refused
            known = None
            return step(), None

    def _confirmed(self, known: tuple[float, Tensor] | None, objective: Objective) -> tuple[float, Tensor] | None:
        """Loss and gradient as recorded, if a replay of the window gives the same loss; none from then on if not."""
        if known is None:
            return None
        recorded, again = known[0], objective.value()
        if math.isfinite(again) and abs(again - recorded) > _ROUNDING * max(abs(recorded), abs(again)):
            self._replays_all = True
            say(
                self._trainer,
                f"The loss of a window was {recorded:.8g} in training and is {again:.8g} in a replay, as where it "
                "depends on a step count, a buffer or a hidden state: Newton steps evaluate loss and gradient again "
                "from now on, in the state at the end of each window.",
            )
            return None
        return known

    def _adapt(self, loss_now: float | None) -> None:
        """Grows or shrinks the parts by what became of the last step.

        Args:
            loss_now: The loss of the new window at the parameters that the last step led to, if it is known.
        """
        if self._last_step is None or not self._budgets.adaptive:
            return
        loss_before, promised, accepted = self._last_step
        whole = self._budgets.gradient_batches == "epoch"  # then this loss and the last are of the same cases
        decrease = loss_before - loss_now if whole and loss_now is not None else promised
        poor = not accepted or decrease < 0.5 * promised or decrease < _SLOW * abs(loss_before)
        self.growth = self.growth * 2 if poor else self.growth / 2
        self.growth = min(max(self.growth, 1.0), self._budgets.largest_growth)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What decides about later windows, with the batches of a half-filled and of a held one.

        A batch of a custom class is not stored, nor are the batches of several processes, of which a checkpoint holds
        only the first one's, nor those of a step that an exception has ended; ``"window"`` and ``"held"`` are then
        ``None``.
        """
        alone = self._trainer.world_size == 1
        return {
            "steps_taken": self.steps_taken,
            "batch_gradients": self.batch_gradients,
            "growth": self.growth,
            "replays_all": self._replays_all,
            "last_step": self._last_step,
            "holds": self._held is not None,
            "offered": self._extent.offered,
            "waiting": len(self._window.steps) + self._unfinished,
            "window": self._window.state_dict() if alone and not self._unfinished else None,
            "held": self._held.state_dict() if alone and self._held is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; batches that it does not hold are collected anew, with a warning."""
        self.steps_taken, self.growth, self._last_step = state["steps_taken"], state["growth"], state["last_step"]
        self.batch_gradients = state["batch_gradients"]
        self._replays_all = state.get("replays_all", False)  # older checkpoints do not say
        alone = self._trainer.world_size == 1  # the weights of a stored window are those of one process
        window, held = (state["window"], state["held"]) if alone else (None, None)
        if window is not None:
            self._window = Batches.from_state(window, self._module.device)
        if held is not None:
            self._held = Batches.from_state(held, self._module.device)
        missing = state["waiting"] if window is None else 0
        self._extent.offered = 0 if missing else state.get("offered", len(self._window.steps))  # older ones do not say
        if missing or (state["holds"] and held is None):
            rank_zero_warn(
                "The checkpoint was written while batches waited for a Newton step, and it could not hold them "
                "(batches of a custom class, several processes, or a step that was cut short): they are collected "
                "anew, so this run is not the uninterrupted one bit for bit. Save at the end of epochs, and without "
                "hold=True, to avoid this."
            )

    # ------------------------------------------------------------------------------------------------ objectives

    @contextmanager
    def session(self) -> Iterator[Isolation]:
        """One isolation for all evaluations in the body, where each would pay for its own otherwise."""
        if self._isolation is not None:
            yield self._isolation
            return
        with Isolation(self._trainer, self._module) as isolation:
            self._isolation = isolation
            try:
                yield isolation
            finally:
                self._isolation = None

    def _objective(self, window: Batches, indices: Sequence[int]) -> Objective:
        """The mean loss of some of a window's batches, by replay."""
        parameters = self._parameters().tensors
        return Objective(
            [self._closure(window.steps[index], parameters) for index in indices],
            [window.weights[index] for index in indices],
            self_seeding=True,
            reduce=self._mean(indices, window),
        )

    def _closure(self, step: RecordedStep, parameters: Sequence[Tensor]) -> Callable[[], Any]:
        with_output = self._optimizer.curvature != "hessian"

        def closure() -> Any:
            with self.session() as isolation:
                isolation.rewind()
                step.random_state.restore()
                with refusing_writes(self._module, parameters):
                    result = evaluate(self._module, step, with_output=with_output)
                return result + self._penalty() if self._decay else result

        return closure

    def _penalty(self) -> Tensor:
        """Half the weighted squared norm: its gradient is what SGD's weight decay adds."""
        penalties = [decay / 2 * p.square().sum() for tensors, decay in self._decay for p in tensors if p.requires_grad]
        return torch.stack(penalties).sum() if penalties else torch.zeros((), device=self._module.device)

    def _with_decay(self, loss: float, gradient: Tensor) -> tuple[float, Tensor]:
        parameters = self._parameters()
        decay_of = {id(p): decay for tensors, decay in self._decay for p in tensors}
        with torch.no_grad():
            added = parameters.flatten([p * decay_of.get(id(p), 0.0) for p in parameters.tensors])
            return loss + float(self._penalty()), gradient + added

    def _parameters(self) -> FlatParameters:
        return FlatParameters.of_groups(self._optimizer.param_groups)

    @property
    def _count(self) -> int:
        return 1 if self._processes is None else self._processes.size

    def _sum(self, numbers: Sequence[float]) -> Tensor:
        """Sums of numbers over the processes, float64."""
        own = torch.tensor(numbers, dtype=torch.float64)
        return own if self._processes is None else self._processes.sum(own)

    def _mean(self, indices: Sequence[int], window: Batches) -> ProcessMean | None:
        """The mean over processes that goes with some batches of a window."""
        if self._processes is None:
            return None
        share = sum(window.weights[i] for i in indices) / sum(window.totals[i] for i in indices)
        return ProcessMean(self._processes, share)


def _is_survivable(error: Exception, trainer: Trainer) -> bool:
    """Whether training can go on without this step, on all processes alike."""
    # Numbers are averaged over processes, and all of them raise where one is not finite; memory runs out on one alone.
    return isinstance(error, FloatingPointError) or (is_out_of_memory(error) and trainer.world_size == 1)
