"""The learning rates of a Newton optimizer that took another one's place, whatever else writes into its groups."""

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sfn.newton.optimizer import SaddleFreeNewton

__all__ = ["OwnRates"]


class OwnRates:
    """Keeps the learning rates that a Newton optimizer was made with.

    Schedules that callbacks and hooks write into ``trainer.optimizers[0]`` are those of the optimizer whose place it
    took. Newton steps have a natural length of 1, which such a rate would shrink to nothing.

    Args:
        newton: The optimizer, as it was made.
        who: Name of what made it, for the warning.
    """

    def __init__(self, newton: SaddleFreeNewton, who: str) -> None:
        self._newton, self._who, self._warned = newton, who, False
        self.remember()

    def remember(self) -> None:
        """Takes the present learning rates for the optimizer's own, as after loading its state."""
        self._rates = [float(group["lr"]) for group in self._newton.param_groups]

    def restore(self) -> None:
        """Puts the learning rates back; the first one that something else wrote is told of."""
        groups = self._newton.param_groups
        for group, rate in zip(groups, self._of(groups), strict=True):
            written, group["lr"] = float(group["lr"]), rate
            if written != rate and not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"{self._who} ignores the learning rate {written:.3g} that a callback or hook wrote into the "
                    f"optimizer, because Newton steps have a natural length and go on with {rate:.3g}: pass "
                    "optimizer=functools.partial(SaddleFreeNewton, lr=...) for another one."
                )

    def put_into(self, state: dict[str, Any]) -> dict[str, Any]:
        """Puts the optimizer's own learning rates into its state, where others may have left theirs.

        Args:
            state: What the optimizer's ``state_dict`` gave.

        Returns:
            The same state.
        """
        for group, rate in zip(state["param_groups"], self._of(state["param_groups"]), strict=True):
            group["lr"] = rate
        return state

    def _of(self, groups: list[dict[str, Any]]) -> list[float]:
        """The rates, the default for groups that were added meanwhile (layers that a finetuning callback frees)."""
        return self._rates + [float(self._newton.defaults["lr"])] * (len(groups) - len(self._rates))
