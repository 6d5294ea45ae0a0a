"""Steps that trial data alone have judged: confirmed, or taken back, when the objective is next seen.

Trial losses on a part of the data may promise a decrease that the objective does not have. Its next value, which comes
with the next gradient anyway, tells. A higher one may have another reason, where each step has data of its own: so
the objective is evaluated once more where the step began, and only the very loss from before proves the step wrong.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.reductions import norm

__all__ = ["Unconfirmed", "is_same_loss", "rounding_of"]

_SAME_LOSS = 1e-5  # relative difference of a loss evaluated twice at one point, rounding included


def rounding_of(loss: float) -> float:
    """By how much a loss may differ when it is evaluated again at the same point."""
    return _SAME_LOSS * abs(loss)


def is_same_loss(again: float, before: float) -> bool:
    """Whether two values at one point are of one function; a value that is not finite is of none."""
    return abs(again - before) <= rounding_of(before)


@dataclass(frozen=True)
class Unconfirmed:
    """A step that lowers the trial loss, as far as the objective has not been seen after it.

    Attributes:
        origin: The parameters before the step, shape ``(n,)``.
        loss: The objective there.
        length: Norm of the parameters after the step: of any other length, they are no longer what it led to.
    """

    origin: Tensor
    loss: float
    length: float

    @classmethod
    def after(cls, origin: Tensor, loss: float, parameters: FlatParameters) -> "Unconfirmed":
        """The step from an origin, where the objective has a known loss, to the present parameters."""
        return cls(origin, loss, float(norm(parameters.read())))

    def take_back(
        self, parameters: FlatParameters, objective: Objective, loss: float, same_function: bool | None
    ) -> bool:
        """Goes back to where the step began, if it has raised the objective.

        Args:
            parameters: The parameters; changed only if the step is taken back.
            objective: What is minimized.
            loss: The objective at the present parameters.
            same_function: Whether it is the function that the step began on; if ``None``, its loss there tells.

        Returns:
            Whether the step was taken back.

        Raises:
            ProcessError: Another process failed.
        """
        if loss <= self.loss + rounding_of(self.loss) or same_function is False:
            return False
        present = parameters.read()
        if not _agreed(float(norm(present)) == self.length, objective):
            return False  # someone else has changed them since, and may have had reasons to
        parameters.write(self.origin)
        if same_function or is_same_loss(objective.value(), self.loss):
            return True
        parameters.write(present)
        return False

    def state_dict(self) -> dict[str, Any]:
        """The origin, its loss, and the length after the step."""
        return {"origin": self.origin, "loss": self.loss, "length": self.length}


def _agreed(answer: bool, objective: Objective) -> bool:
    """Rank zero's answer: what depends on it is evaluated by all processes together."""
    if objective.processes is None:
        return answer
    return bool(objective.processes.from_first(torch.tensor(float(answer), dtype=torch.float64, device="cpu")))
