"""What tests of the step hand to it: a plain descent, and a damping that listens."""

from typing import Any

import torch

from lightning_sfn.newton import FixedDamping, IdentityPreconditioner
from lightning_sfn.newton.outer_step import Descent
from lightning_sfn.newton.trust_region import RULES


def descent(**options: Any) -> Descent:
    """The saddle-free rule in the parameters' own coordinates, unless told otherwise."""
    return Descent(
        **{
            "krylov_dim": 5,
            "preconditioner": IdentityPreconditioner(),
            "rule": RULES["saddle_free"],
            "exploration": 0.0,
            "generator": torch.Generator().manual_seed(0),
            "learning_rates": 1.0,
            "max_grad_norm": None,
            "max_step_norm": None,
            **options,
        }
    )


class Listening(FixedDamping):
    """Notes what it learns of steps."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.heard: list[tuple[bool, float]] = []

    def feedback(self, *, accepted: bool, reduction_ratio: float) -> None:
        self.heard.append((accepted, reduction_ratio))
