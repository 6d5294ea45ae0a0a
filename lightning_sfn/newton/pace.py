"""Whose turn it is: steps in a subspace, or momentum steps, by what each kind has lately achieved for its price.

Near a saddle a subspace is worth many gradients; on the way down a long valley cheap steps with momentum are. Which of
the two holds is measured: the kinds alternate, and the turns of the better one grow.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Kind", "Pace"]

Kind = Literal["subspace", "momentum"]

_PRICE: dict[Kind, float] = {"subspace": 4.0, "momentum": 1.0}  # in gradients, with small parts for products and trials
_SHORTEST: dict[Kind, float] = {"subspace": 4.0, "momentum": 40.0}  # price of a turn that shows what a kind can do
_LONGEST: dict[Kind, float] = {"subspace": 320.0, "momentum": 320.0}
_HARVEST = 4.0  # price of the subspace step that gathers what momentum has gained: it leaves the loss oscillating


@dataclass
class Pace:
    """The turns of the two kinds of steps.

    Attributes:
        kind: Whose turn it is.
        spent: Price of this turn so far, in gradients.
        lengths: Price of a turn of each kind, in gradients.
        rates: What each kind's last turn achieved: decrease of the loss for each gradient's price. The first subspace
            step after momentum counts as momentum's: it ends the oscillation that momentum leaves behind.
        sown: Loss before the last momentum turn, and the price of that turn.
        gathered: Loss of this subspace turn after that first step.
    """

    kind: Kind = "subspace"
    spent: float = 0.0
    lengths: dict[Kind, float] = field(default_factory=lambda: dict(_SHORTEST))
    rates: dict[Kind, float] = field(default_factory=dict)
    sown: tuple[float, float] | None = None
    gathered: float | None = None

    @property
    def favourite(self) -> Kind:
        """The kind that did better when both were last compared."""
        return "momentum" if self.rates.get("momentum", -1.0) > self.rates.get("subspace", 0.0) else "subspace"

    def observe(self, loss: float) -> Kind:
        """Says which kind the next step is.

        Args:
            loss: The objective at the present parameters, before that step.

        Returns:
            The kind.
        """
        if self.kind == "momentum" and self.spent >= self.lengths["momentum"]:
            self.end_momentum()
        if self.kind == "subspace":
            self._account(loss)
        self.spent += _PRICE[self.kind]
        return self.kind

    @property
    def has_harvested(self) -> bool:
        """Whether the loss that is observed next is what the last momentum turn has come to."""
        return self.kind == "subspace" and self.sown is not None and self.gathered is None and self.spent >= _HARVEST

    def end_momentum(self) -> None:
        """Ends a momentum turn, at its length or where it has led astray; nothing to end in a turn of subspaces."""
        if self.kind == "subspace":
            return
        if self.sown is not None:
            self.sown = (self.sown[0], self.spent)
        self.kind, self.spent = "subspace", 0.0

    def _account(self, loss: float) -> None:
        harvest = 0.0 if self.sown is None else _HARVEST
        if self.gathered is None and self.spent >= harvest:
            self.gathered = loss
            if self.sown is not None:
                self.rates["momentum"] = (self.sown[0] - loss) / (self.sown[1] + harvest)
        if self.gathered is not None and self.spent >= harvest + self.lengths["subspace"]:
            self.rates["subspace"] = (self.gathered - loss) / (self.spent - harvest)
            if self.sown is not None:
                self._compare()
            self.kind, self.spent, self.sown, self.gathered = "momentum", 0.0, (loss, 0.0), None

    def _compare(self) -> None:
        better = self.favourite
        worse: Kind = "subspace" if better == "momentum" else "momentum"
        self.lengths[better] = min(2 * self.lengths[better], _LONGEST[better])
        self.lengths[worse] = _SHORTEST[worse]

    def state_dict(self) -> dict[str, Any]:
        """The turns as names and numbers."""
        return deepcopy(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        vars(self).update(deepcopy(state))
