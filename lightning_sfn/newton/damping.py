"""How the damping of a step is chosen: by trial losses (grid, warm), by a ratio (Levenberg-Marquardt), or fixed.

A strategy is shown `TrialLosses`, which map damping values to the losses after their steps. All values of one call
share the subspace's eigendecomposition and one matrix product. What the quadratic model predicts takes no forward pass.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_sfn.newton.options import is_number

__all__ = [
    "Choice",
    "Damping",
    "FixedDamping",
    "GridDamping",
    "LevenbergMarquardt",
    "TrialLosses",
    "WarmDamping",
    "make_damping",
]

_INITIAL, _LOWEST, _HIGHEST = 1e-2, 1e-9, 10.0  # dampings, times the largest absolute eigenvalue


class TrialLosses(Protocol):
    """What a strategy may ask about the steps that damping values give."""

    def __call__(self, dampings: Sequence[float], /) -> Sequence[float]:
        """The losses after the steps, a forward pass for each; one that is not finite counts as infinite."""

    def predicted(self, dampings: Sequence[float], /) -> Sequence[float]:
        """The decreases of the loss that the quadratic model predicts, without a forward pass.

        Bounds on a step's length are left aside, and so are learning rates that differ between groups.
        """


@dataclass(frozen=True)
class Choice:
    """What a strategy settled on.

    Attributes:
        damping: The damping with the lowest trial loss.
        loss: That trial loss; infinite if none was finite.
        trials: Number of trial losses spent.
    """

    damping: float
    loss: float
    trials: int


class Damping(ABC):
    """A damping strategy, with the state that it carries from step to step.

    Attributes:
        value: The damping of the last step; ``None`` before the first.
    """

    def __init__(self) -> None:
        self.value: float | None = None

    @abstractmethod
    def choose(self, trial_losses: TrialLosses, *, scale: float, baseline: float) -> Choice:
        """Chooses the damping of one step.

        Args:
            trial_losses: The trial losses of several damping values.
            scale: Largest absolute eigenvalue of the subspace; the unit in which adaptive strategies think.
            baseline: The trial loss without a step.
        """

    def feedback(self, *, accepted: bool, reduction_ratio: float) -> None:  # noqa: B027  (most learn nothing)
        """Learns how the chosen step did.

        Args:
            accepted: Whether the step was taken.
            reduction_ratio: Actual over predicted decrease of the loss.
        """

    def state_dict(self) -> dict[str, Any]:
        """What is carried from step to step, as numbers."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.value = state["value"]


class FixedDamping(Damping):
    """One damping for every step.

    Args:
        value: The damping, in the unit of the Hessian's eigenvalues.

    Raises:
        ValueError: The value is not positive.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"damping is {value}, but a positive number is expected.")
        self.value = float(value)

    def choose(self, trial_losses: TrialLosses, *, scale: float, baseline: float) -> Choice:
        """Tries the one value."""
        assert self.value is not None
        return Choice(self.value, trial_losses([self.value])[0], 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps its own value, which is an option and no state: a resumed run can be given another one."""


class GridDamping(Damping):
    """The best of a fixed set of values, chosen anew at each step (the paper's Appendix F).

    Args:
        values: The set, in the unit of the Hessian's eigenvalues.

    Raises:
        ValueError: The set is empty or holds a value that is not positive.
    """

    def __init__(self, values: Sequence[float] = (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)) -> None:
        super().__init__()
        if not values or any(not (math.isfinite(v) and v > 0) for v in values):
            raise ValueError(f"The damping grid is {list(values)}, but at least one positive number is expected.")
        self.values = tuple(float(v) for v in values)

    def choose(self, trial_losses: TrialLosses, *, scale: float, baseline: float) -> Choice:
        """Tries the whole set and takes the value with the lowest loss."""
        losses = trial_losses(self.values)
        best = min(range(len(losses)), key=losses.__getitem__)
        self.value = self.values[best]
        return Choice(self.value, losses[best], len(losses))


class WarmDamping(Damping):
    """A few candidates around the last damping, more of them while they improve.

    Tries the last value, and its neighbour by a factor of four on the side that the damping last moved to. Where the
    last value lowers the loss, the neighbour has to promise something: the quadratic model must predict a decrease for
    it that is larger by a twentieth than the one that was found, or than the one that was predicted. If it is better by
    as much, the search goes on from there by factors of four in the same way. Where the neighbour is worse, or promises
    too little, the next search looks on the other side; the first one looks on both. What is remembered is the largest
    damping whose decrease is within a fiftieth of the best. If nothing lowers the loss, the search goes up by factors
    of eight until something does: a trial loss costs little next to the products that built the subspace. Values stay
    within ``[1e-9, 10]`` times the largest absolute eigenvalue. A step usually costs one or two trial losses.
    """

    _FACTOR, _RESCUE = 4.0, 8.0
    _WORTHWHILE = 1.05  # growth of the decrease that makes a further trial worth its price
    _AS_GOOD = 0.98  # share of the best decrease at which a larger damping is as good

    def __init__(self) -> None:
        super().__init__()
        self._side = 0  # where to look first: -1 for less damping, 1 for more, 0 for both

    def choose(self, trial_losses: TrialLosses, *, scale: float, baseline: float) -> Choice:
        """Searches from the last value."""
        low, high = _LOWEST * scale, _HIGHEST * scale
        first = min(max(self.value if self.value is not None else _INITIAL * scale, low), high)
        losses: dict[float, float] = {}

        def decrease(damping: float) -> float:
            """By how much a damping lowers the loss; spends a trial loss on a new one."""
            if damping not in losses:
                (losses[damping],) = trial_losses([damping])
            return baseline - losses[damping]

        def follow(value: float, factor: float) -> None:
            """Goes on from a value as long as the next one may lower the loss by enough more, and does."""
            while (following := min(max(value * factor, low), high)) != value:
                found = decrease(value)
                if found > 0:
                    promised, here = trial_losses.predicted([following, value])
                    if promised <= self._WORTHWHILE * max(min(here, found), 0.0):
                        return
                if decrease(following) <= self._WORTHWHILE * max(found, 0.0):
                    return
                value = following

        decrease(first)
        for side in (self._side,) if self._side else (-1, 1):
            follow(first, self._FACTOR**side)
        while max(map(decrease, losses)) <= 0 and max(losses) < high:
            decrease(min(max(losses) * self._RESCUE, high))
        best = min(losses, key=losses.__getitem__)
        self._settle({damping: decrease(damping) for damping in losses}, first, high)
        return Choice(best, losses[best], len(losses))

    def _settle(self, decreases: dict[float, float], middle: float, high: float) -> None:
        """Remembers where the search ended, if anywhere, and where the next one looks first.

        Below all eigenvalues dampings differ by nothing. Of what is as good as the best the largest is remembered, or
        it would drift down there, from where the next way up is long.
        """
        most = max(decreases.values())
        if most <= 0:
            self.value, self._side = high, 0
            return
        self.value = max(damping for damping, decrease in decreases.items() if decrease >= self._AS_GOOD * most)
        if self.value == middle:
            self._side = -self._side or -1
        else:
            self._side = 1 if self.value > middle else -1

    def state_dict(self) -> dict[str, Any]:
        """The last value, and where the next search looks first."""
        return {**super().state_dict(), "side": self._side}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        super().load_state_dict(state)
        self._side = state.get("side", 0)  # another strategy saved a value alone


class LevenbergMarquardt(Damping):
    """One candidate a step; the damping follows the ratio of actual to predicted decrease (Martens 2010).

    A ratio above 3/4 lowers the damping to two thirds, one below 1/4 raises it by a half, a step that is not taken
    raises it fourfold. It stays within ``[1e-9, 10]`` times the largest absolute eigenvalue.
    """

    def choose(self, trial_losses: TrialLosses, *, scale: float, baseline: float) -> Choice:
        """Tries the present value."""
        value = _INITIAL * scale if self.value is None else self.value
        self.value = min(max(value, _LOWEST * scale), _HIGHEST * scale)
        return Choice(self.value, trial_losses([self.value])[0], 1)

    def feedback(self, *, accepted: bool, reduction_ratio: float) -> None:
        """Adapts the damping to the ratio."""
        assert self.value is not None
        if not accepted:
            self.value *= 4.0
        elif reduction_ratio > 0.75:
            self.value *= 2 / 3
        elif reduction_ratio < 0.25:
            self.value *= 3 / 2


_BY_NAME: dict[str, type[Damping]] = {
    "grid": GridDamping,
    "warm": WarmDamping,
    "levenberg_marquardt": LevenbergMarquardt,
}


def make_damping(damping: "str | float | Damping") -> Damping:
    """Makes a strategy from what users write.

    Args:
        damping: ``"grid"``, ``"warm"``, ``"levenberg_marquardt"``, a positive number, or a strategy.

    Returns:
        The strategy.

    Raises:
        ValueError: There is no such strategy, or the number is not positive.
    """
    if isinstance(damping, Damping):
        return damping
    if is_number(damping):
        return FixedDamping(damping)
    if not isinstance(damping, str) or damping not in _BY_NAME:
        raise ValueError(
            f"damping is {damping!r}, but one of {', '.join(map(repr, _BY_NAME))} or a positive number is expected."
        )
    return _BY_NAME[damping]()
