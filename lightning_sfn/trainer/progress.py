"""How fast an optimizer improves a metric, by the clock and by the data that it sees."""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Progress", "Unit"]

Unit = Literal["second", "epoch"]


@dataclass
class Progress:
    """The last checks of one optimizer.

    Attributes:
        sign: 1 where the metric is to rise, -1 where it is to fall.
        checks: How many checks back the speed is measured.
        points: Seconds, epochs and metric at each of them, oldest first.
    """

    sign: int
    checks: int
    points: list[tuple[float, float, float]] = field(default_factory=list)

    def note(self, seconds: float, epochs: float, value: float) -> None:
        """Adds a check; the oldest one is forgotten where there are enough."""
        self.points = [*self.points, (seconds, epochs, value)][-self.checks - 1 :]

    def restart_at(self, value: float) -> None:
        """Counts what has been made so far as nothing: the metric has been what it is now at all noted checks."""
        self.points = [(seconds, epochs, value) for seconds, epochs, _ in self.points]

    @property
    def complete(self) -> bool:
        """Whether there are enough checks to tell the speed."""
        return len(self.points) > self.checks

    def speed(self, unit: Unit) -> float:
        """Improvement per second or epoch over the noted checks; 0 before there are two."""
        if len(self.points) < 2:
            return 0.0
        first, last = self.points[0], self.points[-1]
        spent = last[0] - first[0] if unit == "second" else last[1] - first[1]
        return self.sign * (last[2] - first[2]) / spent + 0.0 if spent > 0 else 0.0  # no -0 in messages

    def state_dict(self) -> list[list[float]]:
        """The checks as plain numbers."""
        return [list(point) for point in self.points]

    def load_state_dict(self, state: list[Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.points = [(seconds, epochs, value) for seconds, epochs, value in state]
