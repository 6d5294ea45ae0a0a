"""A phase of saddle-free Newton in a run that another optimizer began: fed, probed, put in charge and given up."""

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning import Trainer

from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.outlook import Outlook, outlook_of
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.shortage import is_out_of_memory
from lightning_sfn.newton.spectrum import Spectrum, SpectrumSettings, spectrum_of
from lightning_sfn.trainer.handover import Handover, take_clipping
from lightning_sfn.trainer.own_rates import OwnRates
from lightning_sfn.trainer.window import WindowedNewton

__all__ = ["NewtonPhase"]


class NewtonPhase:
    """A Newton optimizer over a run's own parameters, with what feeds it.

    Its window may fill while the first optimizer still trains, to be probed (`outlook`); from `take_over` on it trains.

    Args:
        newton: The optimizer.
        driver: What feeds it.

    Attributes:
        rates: Keeps the optimizer's learning rates its own.
    """

    def __init__(self, newton: SaddleFreeNewton, driver: WindowedNewton) -> None:
        self.newton, self.driver = newton, driver
        self.rates = OwnRates(newton, "SwitchToSFN")

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where another phase was when a checkpoint was written.

        Args:
            state: ``"window"``, the state of its driver, and ``"newton"``, that of its optimizer if it trained.
        """
        self.driver.load_state_dict(state["window"])
        if state["newton"] is not None:
            try:
                self.newton.load_state_dict(state["newton"])
                self.rates.remember()
            except ValueError as error:
                rank_zero_warn(f"SwitchToSFN begins with a new optimizer: {error}")

    def newton_state(self) -> dict[str, Any]:
        """The optimizer's state, for checkpoints."""
        return self.rates.put_into(self.newton.state_dict())

    def take_over(self, trainer: Trainer, handover: Handover) -> str:
        """Puts the Newton optimizer in the first one's place.

        Args:
            trainer: The Trainer, whose clipping by norm the optimizer takes over if it has none of its own.
            handover: Knows the first optimizer.

        Returns:
            What became of parameter groups, weight decay and schedulers, as sentences to append; empty if there is
            nothing to say.
        """
        take_clipping(trainer, self.newton, "SwitchToSFN")
        self.newton.attach(self.driver)
        return handover.to(self.newton)

    def outlook(self, krylov_dim: int) -> Outlook | None:
        """Collects the batches of a step of the first optimizer; probes the curvature where they complete a window.

        Returns:
            What a Newton step promises on that window; ``None`` while it fills.
        """
        objective = self.driver.watch()
        if objective is None:
            return None
        with self.driver.session():
            return outlook_of(self._operator(objective), krylov_dim)

    def spectrum(self, krylov_dim: int) -> Spectrum | None:
        """The spectrum on the curvature batches of the last Newton step, at the present parameters.

        Returns:
            The spectrum; ``None`` before the first step, and where memory does not suffice.
        """
        objective = self.driver.last_curvature
        if objective is None:
            return None
        try:
            with self.driver.session():
                return spectrum_of(self._operator(objective), SpectrumSettings(krylov_dim))
        except Exception as error:
            if objective.is_shared or not is_out_of_memory(error):
                raise
            return None  # the report does without it; the step itself has ways to save memory

    def _operator(self, objective: Objective) -> CurvatureOperator:
        return self.newton.operator(objective, FlatParameters.of_groups(self.newton.param_groups))
