"""Whose turn it is: steps in a subspace, or momentum steps, by what each kind has lately achieved for its price.

Near a saddle a subspace is worth many gradients; on the way down a long valley cheap steps with momentum are. Which of
the two holds is measured: the kinds take turns, the better one gets longer and longer ones, the other one is tried
again after each of them.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Kind", "Pace"]

Kind = Literal["subspace", "momentum"]

_PRICE: dict[Kind, float] = {"subspace": 4.0, "momentum": 1.0}  # in gradients, with small parts for products and trials
_TRY = 20.0  # price of a turn in which a kind shows what it can do
_CLOSE = 0.3  # share of the favourite's rate from which a challenger's turn is prolonged once: momentum builds up
_LONGEST = 16.0  # turns of the better kind, in such turns


@dataclass
class Pace:
    """The turns of the two kinds of steps.

    Attributes:
        kind: Whose turn it is.
        favourite: The kind that did better when both were last compared.
        stretch: Length of the favourite's next turn, in turns of the other kind.
        left: What is left to spend in this turn, in gradients.
        rates: Decrease of the loss for each gradient's price, in the last part of each kind's last turn. The first step
            of a turn does not count: a subspace step reaps what momentum has sown.
        extended: Whether this turn has been prolonged.
        fresh: Whether this turn has not begun yet.
    """

    kind: Kind = "subspace"
    favourite: Kind = "subspace"
    stretch: float = 1.0
    left: float = 2 * _PRICE["subspace"]
    rates: dict[Kind, float] = field(default_factory=dict)
    extended: bool = False
    fresh: bool = True
    _mark: tuple[float, float] | None = None  # loss and what was left where the measured part of this turn began

    def observe(self, loss: float) -> Kind:
        """Says which kind the next step is.

        Args:
            loss: The objective at the present parameters, before that step.

        Returns:
            The kind.
        """
        if self.left <= 0:
            assert self._mark is not None
            before, left = self._mark
            self._end_turn((before - loss) / (left - self.left))
        if not self.fresh and (self._mark is None or (self.left <= _TRY - _PRICE[self.kind] < self._mark[1])):
            self._mark = (loss, self.left)
        self.fresh = False
        self.left -= _PRICE[self.kind]
        return self.kind

    def fail(self) -> None:
        """Ends the turn of a kind that led astray, as one that achieved nothing."""
        self._end_turn(-math.inf)

    def _end_turn(self, rate: float) -> None:
        close = self.kind != self.favourite and rate > _CLOSE * self.rates.get(self.favourite, math.inf)
        if close and not self.extended and rate < self.rates[self.favourite]:  # it may only have begun to gain speed
            self.extended, self.left, self._mark = True, _TRY, None
            return
        self.extended = False
        self.rates[self.kind] = rate
        other: Kind = "momentum" if self.kind == "subspace" else "subspace"
        if self.kind != self.favourite or other not in self.rates:
            better = max(self.rates, key=self.rates.__getitem__)
            self.stretch = min(2 * self.stretch, _LONGEST) if better == self.favourite else 2.0
            self.favourite = better
        self.kind = other
        self.left = _TRY * (self.stretch if self.kind == self.favourite else 1.0)
        self._mark = None
        self.fresh = True

    def state_dict(self) -> dict[str, Any]:
        """The turns as names and numbers."""
        return {
            "kind": self.kind,
            "favourite": self.favourite,
            "stretch": self.stretch,
            "left": self.left,
            "rates": dict(self.rates),
            "extended": self.extended,
            "fresh": self.fresh,
            "mark": self._mark,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.kind, self.favourite = state["kind"], state["favourite"]
        self.stretch, self.left, self.rates = state["stretch"], state["left"], dict(state["rates"])
        self.extended, self.fresh, self._mark = state["extended"], state["fresh"], state["mark"]
