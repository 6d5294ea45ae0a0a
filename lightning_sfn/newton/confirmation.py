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

__all__ = ["SAME_LOSS", "Unconfirmed"]

SAME_LOSS = 1e-5
"""Relative difference of a loss evaluated twice at one point, rounding included."""


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

    def is_refuted(
        self, parameters: FlatParameters, objective: Objective, loss: float, same_function: bool | None
    ) -> bool:
        """Whether the step has raised the objective; then the parameters are back where it began.

        Args:
            parameters: The parameters; changed only if so.
            objective: What is minimized.
            loss: The objective at the present parameters.
            same_function: Whether it is the function that the step began on; if ``None``, its loss there tells.

        Raises:
            ProcessError: Another process failed.
        """
        allowed = SAME_LOSS * abs(self.loss)
        if loss <= self.loss + allowed or same_function is False:
            return False
        present = parameters.read()
        if not _agreed(float(norm(present)) == self.length, objective):
            return False  # someone else has changed them since, and may have had reasons to
        parameters.write(self.origin)
        if same_function or abs(objective.value() - self.loss) <= allowed:
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
    return bool(objective.processes.from_first(torch.tensor(float(answer), dtype=torch.float64)))
