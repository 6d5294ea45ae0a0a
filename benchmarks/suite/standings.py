"""Who won: what the results of the race say of each task and of each target."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

__all__ = ["FIRST_ORDER", "JUDGED", "KFAC_TARGET", "TARGETS", "Standing", "standings"]

JUDGED = "turns"
"""The method that the targets are for."""

FIRST_ORDER = ("sgd", "adam", "lbfgs")
"""Rivals of the targets for the last mile and for recurrent networks."""

TARGETS = {"escape": 0.5, "last mile": 3.0, "recurrent": 1.5}
"""Escape: at most this share of Adam's remaining loss. Otherwise: at least so many times the best rival's decrease."""

KFAC_TARGET = 1.15
"""Times the decrease of K-FAC, at least, on every task."""


@dataclass(frozen=True)
class Standing:
    """One task.

    Attributes:
        task: Its name.
        kind: Its kind.
        start: Median loss at the start.
        losses: Final losses of the seeds for each method, in order of the seeds that all methods have run; infinite
            where a run diverged.
    """

    task: str
    kind: str
    start: float
    losses: dict[str, list[float]]

    def median(self, method: str) -> float:
        """Median final loss."""
        return statistics.median(self.losses[method])

    def decrease(self, method: str) -> float:
        """Median start less median end."""
        return self.start - self.median(method)

    def against(self, method: str) -> tuple[str, float]:
        """The rival of the kind's target, and how the method compares with it: a share of loss, or of decrease.

        A rival that did not lower the loss is beaten infinitely.
        """
        if self.kind == "escape":
            return "adam", self.median(method) / self.median("adam")
        rival = min((name for name in FIRST_ORDER if name in self.losses), key=self.median)
        return rival, self._times(method, rival)

    def against_kfac(self, method: str) -> float:
        """Decrease in decreases of K-FAC."""
        return self._times(method, "kfac")

    @property
    def is_judged(self) -> bool:
        """Whether all that the targets speak of has run."""
        return {JUDGED, "kfac", *FIRST_ORDER} <= self.losses.keys()

    @property
    def wanted(self) -> str:
        """The target of the kind, in words."""
        return f"<= {TARGETS['escape']}" if self.kind == "escape" else f">= {TARGETS[self.kind]}"

    def reached(self, method: str) -> tuple[bool, bool]:
        """Whether the target of the kind and the one against K-FAC are reached."""
        ratio = self.against(method)[1]
        met = ratio <= TARGETS["escape"] if self.kind == "escape" else ratio >= TARGETS[self.kind]
        return met, self.against_kfac(method) >= KFAC_TARGET

    def _times(self, method: str, rival: str) -> float:
        mine, theirs = self.decrease(method), self.decrease(rival)
        return mine / theirs if theirs > 0 else math.copysign(math.inf, mine)


def standings(runs: list[dict[str, Any]], kinds: dict[str, str]) -> list[Standing]:
    """Groups runs by task, in the order of `kinds`.

    Args:
        runs: The results of one budget.
        kinds: The kind of each task.
    """
    found = []
    for task, kind in kinds.items():
        here = [run for run in runs if run["task"] == task]
        methods = list(dict.fromkeys(run["method"] for run in here))
        seeds = sorted({run["seed"] for run in here})
        common = [s for s in seeds if {run["method"] for run in here if run["seed"] == s} == set(methods)]
        if not common:
            continue
        by_key = {(run["method"], run["seed"]): run for run in here}
        losses = {m: [_loss(by_key[m, s]) for s in common] for m in methods}
        start = statistics.median(by_key[methods[0], s]["start"] for s in common)
        found.append(Standing(task, kind, start, losses))
    return found


def _loss(run: dict[str, Any]) -> float:
    return math.inf if run["final"] is None else float(run["final"])
