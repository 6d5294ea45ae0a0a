"""Which arms there are, in which order, and what the search for rates makes of them."""

import logging
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_sfn.experiments.plateau import Problem
from paper_scale.first_order import Adam, FirstOrder, Momentum, Rule, Schedule
from paper_scale.full_batch import FullBatchLBFGS
from paper_scale.method import Method
from paper_scale.newton import our_newton, papers_newton
from paper_scale.pieces import Arm, Piece
from paper_scale.results import Results
from paper_scale.settings import METHODS
from paper_scale.task import Task

__all__ = ["START", "Arms"]

START = "start"
"""The arm of first order from whose end SFN starts."""

_LOG = logging.getLogger("paper_scale")
_FIRST_ORDER = ("adam", "nesterov", "momentum")
_TIMED_UPDATES = 200


class Arms:
    """Runs the arms of some methods, and the searches that they need.

    Args:
        task: The task.
        results: What has been measured so far: the best rates are read from it.
        methods: Names from `METHODS`.
    """

    def __init__(self, task: Task, results: Results, methods: tuple[str, ...] = METHODS) -> None:
        self._task, self._results, self._methods = task, results, methods
        self._settings = task.settings
        self._speeds: dict[str, float] = {}

    def run(self, piece: Piece) -> bool:
        """Goes on until the piece's time is up.

        Args:
            piece: The piece.

        Returns:
            Whether all arms have come to their end.
        """
        return all(piece.run(arm) for arm in self.in_order())

    def in_order(self) -> Iterator[Arm]:
        """The arms, each built when those before it have come to their end."""
        settings = self._settings
        start = settings.start_method if settings.start_seconds > 0 else None
        newton = [name for name in self._methods if name.startswith("sfn")]
        first_order = [name for name in self._methods if name in _FIRST_ORDER]
        searched = [*first_order, *([start] if newton and start is not None and start not in first_order else [])]
        for name in searched:
            for schedule in self._candidates(name):
                yield self._first_order(search_name(name, schedule), name, schedule, settings.search_seconds)
        if newton and start is not None:
            yield self._first_order(START, start, self._best(start), settings.start_seconds)
        for name in self._methods:
            if name in _FIRST_ORDER:
                yield self._first_order(name, name, self._best(name), settings.seconds)
            else:
                after = START if name.startswith("sfn") and start is not None else None
                yield Arm(name, lambda name=name: self._other(name), settings.seconds, after)  # type: ignore[misc]

    def _other(self, name: str) -> Method:
        problem, settings = self._task.problem(), self._settings
        if name == "lbfgs":
            return FullBatchLBFGS(problem, history=settings.history, iterations=settings.lbfgs_iterations)
        return papers_newton(problem, settings) if name == "sfn_paper" else our_newton(problem, settings)

    # ------------------------------------------------------------------------------------------------ first order

    def _candidates(self, name: str) -> list[Schedule]:
        """What is searched; the number of updates is left open."""
        settings = self._settings
        if name == "adam":
            return [Schedule(rate, 0, decays=True) for rate in settings.adam_rates]
        return [Schedule(rate, 0, mu, settings.tail) for rate in settings.rates for mu in settings.momenta]

    def _best(self, name: str) -> Schedule:
        """The candidate with the lowest training error at the end of its search."""

        def error(schedule: Schedule) -> float:
            rows = self._results.of(search_name(name, schedule))
            found = rows[-1]["train_error"] if rows else math.inf
            return found if math.isfinite(found) else math.inf

        best = min(self._candidates(name), key=error)
        rates = {schedule.rate for schedule in self._candidates(name)}
        if len(rates) > 2 and best.rate in (min(rates), max(rates)):
            _LOG.warning("%s: the best rate, %g, is at the edge of those that were searched.", name, best.rate)
        return best

    def _first_order(self, arm: str, name: str, schedule: Schedule, seconds: float) -> Arm:
        def make() -> Method:
            planned = self._settings.updates or self._planned(arm, name, seconds)
            tail = min(schedule.tail, planned // 10)
            whole = Schedule(schedule.rate, planned, schedule.momentum, tail, schedule.decays)
            return self._method(self._task.problem(), name, whole)

        # The plan ends the arm, not the clock, so that momentum's tail and Adam's decay are complete.
        return Arm(arm, make, math.inf, spectra=not arm.startswith("search/"))

    def _method(self, problem: Problem, name: str, schedule: Schedule) -> FirstOrder:
        def rule(point: Tensor) -> Rule:
            return Adam(point) if name == "adam" else Momentum(point, nesterov=name == "nesterov")

        settings = self._settings
        return FirstOrder(
            problem,
            rule,
            schedule,
            batch_size=settings.batch_size,
            seed=settings.seed,
            max_grad_norm=settings.max_grad_norm,
        )

    def _planned(self, arm: str, name: str, seconds: float) -> int:
        """How many updates fit into some seconds: timed once for each arm, and kept in the results file."""
        known = self._results.of(plan_name(arm))
        if known:
            return int(known[0]["planned"])
        if name not in self._speeds:
            self._speeds[name] = self._timed(name)
        planned = max(1, round(seconds * self._speeds[name]))
        self._results.append({"arm": plan_name(arm), "updates": 0, "planned": planned})
        return planned

    def _timed(self, name: str) -> float:
        """Updates in a second."""
        epoch = len(self._task.train) // self._settings.batch_size
        method = self._method(self._task.problem(), name, Schedule(1e-9, epoch + max(epoch, _TIMED_UPDATES), 0.5))
        on_cuda = self._task.device.type == "cuda"
        clock = time.perf_counter if on_cuda else time.process_time
        method.advance()  # what is slow only once
        done = method.counts.updates
        since = clock()
        while not method.finished:
            method.advance()
        if on_cuda:
            torch.cuda.synchronize()
        return (method.counts.updates - done) / max(clock() - since, 1e-6)


def search_name(method: str, schedule: Schedule) -> str:
    """Name of the arm that tries one candidate."""
    momentum = f",momentum={schedule.momentum:g}" if schedule.momentum else ""
    return f"search/{method}/rate={schedule.rate:g}{momentum}"


def plan_name(arm: str) -> str:
    """Name under which an arm's number of updates is kept."""
    return f"plan/{arm}"
