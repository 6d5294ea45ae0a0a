"""Data windows: from loader batches, one at a time, to the three objectives of a Newton step.

A fresh mini-batch for everything does not escape a saddle: each batch has a saddle of its own. So the gradient is
accumulated over a window of loader batches, as Lightning's closure delivers them; Hessian-vector products see a small
part of that window, and trial losses another. On a plateau small parts are not enough: the curvature of a part has
negative directions of its own, larger than those of the whole. So the parts grow where steps achieve little, up to the
whole window, and shrink again where they do well.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sfn.newton.objective import Closure, Objective
from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import ProcessMean
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.replay import RecordedStep, StepRecorder, is_mixed, processes_of, replay_closure

__all__ = ["DataBudgets", "Reduction", "WindowedNewton", "cases_of", "check_reduction"]

Reduction = Literal["mean", "samples"]
"""How batches of several processes are averaged: each process counts alike (as in DDP), or each case."""

_FEWEST = 4  # batches of a part: with fewer, one odd batch decides about a step
_SLOW = 1e-4  # relative decrease of the loss below which a step counts as stuck on a plateau


@dataclass(frozen=True)
class DataBudgets:
    """How much data each ingredient of a step sees.

    Attributes:
        gradient_batches: Loader batches that the gradient is accumulated over before an update, or ``"epoch"``. A
            window never crosses the end of an epoch.
        curvature_fraction: Share of the window's batches that Hessian-vector products see, at least four batches.
        trial_fraction: Share of the window's batches that trial losses see, at least four; others than those of the
            curvature as far as possible.
        adaptive: Whether both shares double after a step that was rejected, misjudged, or lowered the loss by less than
            a ten-thousandth, and halve (down to the values above) after any other.
        hold: Whether the first whole window is kept, and every later loader batch brings one step on it ("everything,
            held": for data that fits into memory several times over).

    Raises:
        MisconfigurationException: A value is out of range.
    """

    gradient_batches: int | Literal["epoch"] = "epoch"
    curvature_fraction: float = 0.1
    trial_fraction: float = 0.1
    adaptive: bool = True
    hold: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.gradient_batches != "epoch" and (
            not isinstance(self.gradient_batches, int) or self.gradient_batches < 1
        ):
            raise MisconfigurationException(
                f"gradient_batches is {self.gradient_batches!r}, but a positive number or 'epoch' is expected."
            )
        for name in ("curvature_fraction", "trial_fraction"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                raise MisconfigurationException(f"{name} is {share}, but a share above 0 and up to 1 is expected.")

    @property
    def largest_growth(self) -> float:
        """Growth at which both parts are the whole window."""
        return 1 / min(self.curvature_fraction, self.trial_fraction)

    def choose(self, count: int, growth: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Draws the batches of the curvature and of the trial losses.

        Args:
            count: Number of batches in the window.
            growth: Factor on both shares.
            generator: Source of the draw.

        Returns:
            Indices for the curvature, and indices for the trial losses.
        """
        order = torch.randperm(count, generator=generator).tolist()
        sizes = (
            min(count, max(_FEWEST, round(share * growth * count)))
            for share in (self.curvature_fraction, self.trial_fraction)
        )
        return sorted(order[: next(sizes)]), sorted(order[::-1][: next(sizes)])


@dataclass
class _Window:
    """What has been collected since the last step."""

    steps: list[RecordedStep] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of each step, in cases
    totals: list[float] = field(default_factory=list)  # sum of these weights over all processes
    gradient: Tensor | None = None  # sum over batches of weight times gradient
    loss: float = 0.0  # likewise
    even: bool = True  # whether this gradient, of Lightning's making, is that of the objective


class WindowedNewton:
    """Takes over `SaddleFreeNewton.step` inside Lightning's loop (a `Driver`).

    Each call runs Lightning's closure once, so logging, hooks and accumulation are Lightning's own. When the window is
    complete, one Newton step is taken on it; everything beyond the gradient comes from isolated replays. Gradients
    enter the window before Lightning clips them (`note_gradient`).

    Args:
        trainer: The Trainer.
        module: The module.
        optimizer: The optimizer that now belongs to the Trainer.
        budgets: How much data each ingredient sees.
        weight_decay: Pairs of parameters and weight decay; the penalty becomes part of the objective.
        reduction: ``"mean"`` is the mean over processes and accumulated batches of their means, as in Lightning;
            ``"samples"`` the mean over all cases. The two differ where batches do in size; then ``"samples"`` costs one
            more gradient, since Lightning's is that of the other objective.
        before_step: Called before each Newton step, when its objectives are known.
        on_step: Called with the record of each Newton step.

    Attributes:
        steps_taken: Newton steps so far.
        growth: Present factor on the shares of the window that curvature and trials see.
        last_curvature: The objective that the products of the last (or coming) step see.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: SaddleFreeNewton,
        budgets: DataBudgets,
        *,
        weight_decay: Sequence[tuple[Sequence[Tensor], float]] = (),
        reduction: Reduction = "mean",
        before_step: Callable[[], None],
        on_step: Callable[[StepRecord], None],
    ) -> None:
        """See the class."""
        self._trainer, self._module, self._optimizer, self._budgets = trainer, module, optimizer, budgets
        self._decay = [(list(tensors), decay) for tensors, decay in weight_decay if decay]
        self._by_cases = reduction == "samples"
        self._before_step, self._on_step = before_step, on_step
        self._processes = optimizer.processes = processes_of(trainer)
        self._recorder = StepRecorder(trainer, module.device)
        self._window = _Window()
        self._held: _Window | None = None
        self.steps_taken = 0
        self.growth = 1.0
        self._unclipped: Tensor | None = None
        self._last_step: tuple[float, float, bool] | None = None  # loss before, promised decrease, accepted
        self.last_curvature: Objective | None = None

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Runs Lightning's closure; takes a Newton step if it completes the window.

        Args:
            closure: Lightning's closure. A gradient scaler has run it already, and passes none.

        Returns:
            What the closure returned.
        """
        result = closure() if closure is not None else None
        recorded = [step for step in self._recorder.take() if step.loss is not None]
        if self._trainer.fit_loop._skip_backward:
            return result  # weight averaging passes over the data for batch norm's statistics alone
        if self._held is not None:
            self._newton_step(self._held, None)
        else:
            if recorded:
                self._collect(recorded)
            if self._complete():
                self._step_on_window()
        return result

    def note_gradient(self) -> None:
        """Keeps the gradient that Lightning is about to clip: secants and trial losses need the objective's own."""
        self._unclipped = self._parameters().gradients()

    def end_epoch(self) -> None:
        """Takes the step of a window that the end of the epoch cut short unannounced (a hook that ended the epoch)."""
        self._step_on_window()

    def _step_on_window(self) -> None:
        window, self._window = self._window, _Window()
        if not window.steps:
            return
        if self._budgets.hold:
            self._held = window
        self._newton_step(window, self._loss_and_gradient(window))

    def detach(self) -> None:
        """Gives Lightning's `training_step` back, and the memory that held the window."""
        self._recorder.detach()
        self._window, self._held, self.last_curvature = _Window(), None, None

    def _collect(self, recorded: list[RecordedStep]) -> None:
        """Adds the batches of one optimizer step, whose mean gradient lies in ``.grad``, to the window."""
        parameters = self._parameters()
        # Lightning's mean over accumulated batches is unweighted, whatever their sizes: the objective must be the same.
        # A gradient scaler that skipped a step left its batches behind: only the last ones made this gradient.
        recorded = recorded[-self._trainer.accumulate_grad_batches :]
        # Lightning divides by the nominal number of accumulated batches, also where an epoch ends before it is reached.
        correction = self._trainer.accumulate_grad_batches / len(recorded)
        unclipped, self._unclipped = self._unclipped, None
        gradient = parameters.gradients() if unclipped is None else unclipped
        mean = self._add(recorded)
        window = self._window
        gradient = gradient * (correction * mean * len(recorded))
        window.gradient = gradient if window.gradient is None else window.gradient.add_(gradient)
        window.loss += sum(float(step.loss) for step in recorded if step.loss is not None) * mean

    def _add(self, recorded: Sequence[RecordedStep]) -> float:
        """Adds batches with their weights to the window; returns their mean size over all processes."""
        window = self._window
        cases = [cases_of(step) for step in recorded]
        totals, squares = self._sum([*cases, *(size**2 for size in cases)]).view(2, -1)
        batches = len(cases) * self._count
        mean = float(totals.sum()) / batches
        window.steps.extend(recorded)
        if self._by_cases:
            window.weights.extend(cases)
            window.totals.extend(totals.tolist())
            window.even &= batches * float(squares.sum()) == float(totals.sum()) ** 2
        else:  # gradients are averaged over processes and batches without weights
            window.weights.extend([mean] * len(cases))
            window.totals.extend([mean * self._count] * len(cases))
        return mean

    def _loss_and_gradient(self, window: _Window) -> tuple[float, Tensor] | None:
        """Mean loss and gradient of a window over all processes, weight decay included, where Lightning gave them."""
        if not window.even:
            return None
        total = sum(window.weights)
        assert window.gradient is not None
        mean = self._mean(range(len(window.steps)), window)
        loss = torch.tensor(window.loss / total, dtype=torch.float64)
        whole = float(loss if mean is None else mean(loss))
        gradient = window.gradient / total  # the strategy averaged it over the processes
        return self._with_decay(whole, gradient) if self._decay else (whole, gradient)

    def _complete(self) -> bool:
        epoch_over = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        budget = self._budgets.gradient_batches
        return epoch_over or (budget != "epoch" and len(self._window.steps) >= budget)

    def _newton_step(self, window: _Window, loss_and_gradient: tuple[float, Tensor] | None) -> None:
        everything = range(len(window.steps))
        self._adapt(loss_and_gradient[0] if loss_and_gradient is not None else None)
        generator = torch.Generator().manual_seed(self.steps_taken)
        curvature, trial = self._budgets.choose(len(everything), self.growth, generator)
        objective = self._objective(window, everything)
        self.last_curvature = objective if len(curvature) == len(everything) else self._objective(window, curvature)
        self._before_step()
        record = self._optimizer.step_on(
            objective,
            curvature=self.last_curvature,
            # Under autocast the window's loss is not that of its replays, with which trial losses are compared.
            trial=objective
            if len(trial) == len(everything) and not is_mixed(self._trainer)
            else self._objective(window, trial),
            loss_and_gradient=loss_and_gradient,
            # Other windows hold other cases or other random numbers: there the losses tell.
            same_function=True if self._held is not None else None,
        )
        self._last_step = (record.loss_before, record.loss_before - record.loss_after, record.accepted)
        self.steps_taken += 1
        self._on_step(record)

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

    def state_dict(self) -> dict[str, Any]:
        """What decides about later windows."""
        return {"steps_taken": self.steps_taken, "growth": self.growth, "last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.steps_taken, self.growth, self._last_step = state["steps_taken"], state["growth"], state["last_step"]

    def _objective(self, window: _Window, indices: Sequence[int]) -> Objective:
        """The mean loss of some of a window's batches, by replay."""
        steps = [window.steps[index] for index in indices]
        return Objective(
            [self._closure(step) for step in steps],
            [window.weights[index] for index in indices],
            random_states=[step.random_state for step in steps],
            reduce=self._mean(indices, window),
        )

    def _closure(self, step: RecordedStep) -> Closure:
        replay = replay_closure(self._trainer, self._module, step)
        if not self._decay:
            return replay

        def with_decay() -> Tensor:
            loss = replay()
            assert isinstance(loss, Tensor)
            return loss + self._penalty()

        return with_decay

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

    def _mean(self, indices: Sequence[int], window: _Window) -> ProcessMean | None:
        """The mean over processes that goes with some batches of a window."""
        if self._processes is None:
            return None
        share = sum(window.weights[i] for i in indices) / sum(window.totals[i] for i in indices)
        return ProcessMean(self._processes, share)


def check_reduction(reduction: str) -> None:
    """Checks the name of a reduction.

    Args:
        reduction: ``"mean"`` or ``"samples"``.

    Raises:
        MisconfigurationException: It is neither.
    """
    if reduction not in get_args(Reduction):
        raise MisconfigurationException(f"reduction is {reduction!r}, but 'mean' or 'samples' is expected.")


def cases_of(step: RecordedStep) -> float:
    """Number of cases in a recorded batch; 1 where Lightning cannot tell.

    Args:
        step: The recorded step.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            size = extract_batch_size(step.args[0] if step.args else next(iter(step.kwargs.values())))
        except (MisconfigurationException, StopIteration):
            return 1.0
    return float(size) if math.isfinite(size) and size > 0 else 1.0
