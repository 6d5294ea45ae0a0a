"""A rehearsal on the first batch, so that a run does not fail hours later, at its plateau."""

import math
import warnings
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.diagnosis import CurvatureError
from lightning_sfn.newton.objective import Objective, ObjectiveError
from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.preconditioner import Preconditioner
from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.newton.shortage import is_out_of_memory
from lightning_sfn.trainer.isolation import Isolation
from lightning_sfn.trainer.own_writes import ParameterCopies, UnforeseenWriteError, foreseen, refusal
from lightning_sfn.trainer.recording import RecordedStep, own_containers, step_arguments
from lightning_sfn.trainer.replay import evaluate, require_repeatable

__all__ = ["Rehearsal"]


class Rehearsal:
    """Does once, on the first batch that gives a loss, what a Newton step does with each."""

    def __init__(self) -> None:
        self._step: RecordedStep | None = None
        self._over = False

    def note(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps a batch before its training step, as long as none has been rehearsed."""
        if not self._over:
            arguments = own_containers(step_arguments(trainer, batch, batch_idx))
            self._step = RecordedStep(arguments, {}, RandomState.capture(module.device), None)

    def hold(
        self, trainer: Trainer, module: LightningModule, make_newton: Callable[[], SaddleFreeNewton], who: str
    ) -> None:
        """Rehearses the batch that was kept, after its training step gave a loss.

        Args:
            trainer: The Trainer.
            module: The module.
            make_newton: Makes the optimizer that a switch would use.
            who: Name of the callback that asks, for the message.

        Raises:
            MisconfigurationException: A replay gives another loss each time or changes what is trained, an operation
                has no second derivative, or the optimizer's coordinates cannot be estimated.
        """
        if self._step is not None:
            step = self._step
            foreseen(trainer, lambda: _rehearse(trainer, module, make_newton(), step, who))
            self._step, self._over = None, True


def _rehearse(
    trainer: Trainer, module: LightningModule, newton: SaddleFreeNewton, recorded: RecordedStep, who: str
) -> None:
    """Takes a Hessian-vector product of one recorded step, evaluates it again, and estimates coordinates from it."""
    parameters = FlatParameters.of_groups(newton.param_groups)
    with Isolation(trainer, module) as isolation, torch.no_grad():

        def closure() -> Any:
            isolation.rewind()
            recorded.random_state.restore()
            return evaluate(module, recorded, with_output=newton.curvature != "hessian")

        objective = Objective([closure], self_seeding=True)
        try:
            with ParameterCopies(module) as copies, closing(newton.operator(objective, parameters)) as operator:
                loss = objective.value()
                _require_untouched(parameters, copies.restore(), module, who)
                operator.matvec(parameters.read())
                if math.isfinite(loss):
                    require_repeatable(objective, loss)
                    _require_coordinates(newton.preconditioner, operator, module, who)
        except (CurvatureError, ObjectiveError) as error:
            if not is_out_of_memory(error):
                raise MisconfigurationException(f"{who} cannot replay training_step. {error}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise


def _require_untouched(parameters: FlatParameters, changed: list[str], module: LightningModule, who: str) -> None:
    """Refuses a step that changes parameters, given by name, that are being trained."""
    trained = {id(p) for p in parameters.tensors}
    names = [name for name, p in module.named_parameters() if name in changed and id(p) in trained]
    if names:
        raise refusal(module, names, who)


def _require_coordinates(
    coordinates: Preconditioner, operator: CurvatureOperator, module: LightningModule, who: str
) -> None:
    """Estimates an optimizer's coordinates once, on a copy: the factory may give the same object to the switch."""
    shared = {id(part): part for part in (*module.modules(), *module.parameters())}  # what is not copied along
    copy = deepcopy(coordinates, shared)
    generator = torch.Generator(operator.parameters.device).manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is still true at the switch is said there
            copy.refresh(operator, generator)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (CurvatureError, ObjectiveError, UnforeseenWriteError)):
            raise
        raise MisconfigurationException(
            f"{who} cannot estimate the coordinates of its optimizer, {type(coordinates).__name__}, from replays of "
            f"training_step ({type(error).__name__}: {error}): pass preconditioner='diagonal' to the optimizer, which "
            "needs Hessian-vector products alone."
        ) from error
