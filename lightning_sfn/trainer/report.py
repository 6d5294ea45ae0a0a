"""What each optimizer of a run gained and what it cost."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_sfn.newton.spectrum import Spectrum

__all__ = ["Phase", "SwitchReport"]


@dataclass
class Phase:
    """The time in which one optimizer trained.

    Attributes:
        optimizer: Its class name.
        newton: Whether it is SFN.
        before: The metric at the beginning; at the first check in the first phase, and in those of SFN at the last
            check before a step was taken.
        after: The metric at the end.
        seconds: Seconds, everything included (validation too).
        steps: Optimizer steps; for SFN, Newton steps tried.
        taken: Steps that changed the parameters.
        gradients: Gradients of one loader batch; for SFN, those of Newton steps included.
        products: Hessian-vector products.
        clipped: Newton steps that began with a gradient longer than ``max_grad_norm``.
        first_taken_at: In which training batch (counted over all epochs) the first Newton step was taken.
        unseen: Whether the metric has not been seen since, so that what SFN gained is not known.
    """

    optimizer: str
    newton: bool = False
    before: float = math.nan
    after: float = math.nan
    seconds: float = 0.0
    steps: int = 0
    taken: int = 0
    gradients: int = 0
    products: int = 0
    clipped: int = 0
    first_taken_at: int | None = None
    unseen: bool = False


@dataclass
class SwitchReport:
    """Numbers of one run, filled in while it goes on.

    Attributes:
        monitor: Name of the monitored metric.
        sign: 1 where the metric is to rise, -1 where it is to fall.
        phases: One optimizer after the other, the first one first.
        last_speed: Improvement per second that the first optimizer still made over the checks before the last switch.
        checks: How many checks these were; 0 if the metric had not been seen twice.
        lowest: The lowest value of the metric that was seen.
        last_step: The loss on its window before and after the last Newton step, which the metric may not know yet: what
            an epoch logs is computed before the step at its end.
        estimated_from: What the second of these may be an estimate from; empty where all batches of the window were
            evaluated after the step.
        has_penalty: Whether both contain weight decay, as part of the objective.
        spectrum_at_switch: Spectrum on the curvature batches of the first Newton step.
        spectrum_at_end: Spectrum on those of the last one, at the final parameters.
    """

    monitor: str
    sign: int = -1
    phases: list[Phase] = field(default_factory=list)
    last_speed: float = 0.0
    checks: int = 0
    lowest: float = math.inf
    last_step: tuple[float, float] | None = None
    estimated_from: str = ""
    has_penalty: bool = False
    spectrum_at_switch: Spectrum | None = field(default=None, repr=False)
    spectrum_at_end: Spectrum | None = field(default=None, repr=False)

    # ------------------------------------------------------------------------------------------------ sums

    @property
    def first_optimizer(self) -> str:
        """Class name of the optimizer that stalled."""
        return self.phases[0].optimizer

    @property
    def plateau(self) -> float:
        """The metric at the first switch."""
        return next((phase.before for phase in self.phases if phase.newton), math.nan)

    @property
    def final(self) -> float:
        """The metric at the end."""
        return self.phases[-1].after

    @property
    def first_steps(self) -> int:
        """Steps of the first optimizer."""
        return sum(phase.steps for phase in self._of(newton=False))

    @property
    def first_seconds(self) -> float:
        """Seconds with the first optimizer."""
        return sum(phase.seconds for phase in self._of(newton=False))

    @property
    def newton_steps(self) -> int:
        """Newton steps tried."""
        return sum(phase.steps for phase in self._of(newton=True))

    @property
    def accepted_steps(self) -> int:
        """Newton steps that lowered the trial loss."""
        return sum(phase.taken for phase in self._of(newton=True))

    @property
    def newton_seconds(self) -> float:
        """Seconds with SFN, first-order passes over the data included."""
        return sum(phase.seconds for phase in self._of(newton=True))

    @property
    def products(self) -> int:
        """Hessian-vector products."""
        return sum(phase.products for phase in self.phases)

    def _of(self, *, newton: bool) -> list[Phase]:
        return [phase for phase in self.phases if phase.newton == newton]

    def gain(self, phases: Iterable[Phase]) -> float:
        """Improvement of the metric in some phases; phases in which it is not known count as none."""
        return sum(self.sign * (phase.after - phase.before) for phase in phases if _is_known(phase))

    def speed(self, *, newton: bool) -> float:
        """Improvement of the metric per second with SFN, or with the first optimizer."""
        phases = self._of(newton=newton)
        seconds = sum(phase.seconds for phase in phases)
        return self.gain(phases) / seconds if seconds > 0 else 0.0

    @property
    def _is_gain_known(self) -> bool:
        return any(map(_is_known, self._of(newton=True)))

    @property
    def paid(self) -> bool:
        """Whether SFN improved the metric, and faster than the first optimizer did just before the switch."""
        return self.speed(newton=True) > max(self.last_speed, 0.0)

    @property
    def is_undecided(self) -> bool:
        """Whether SFN improved the metric, and slower only than at a rate that cannot have lasted.

        A metric that is to fall and was never negative is taken to be bounded by zero. The first optimizer's last rate
        cannot have lasted where, kept up for as long as SFN trained, it leads below zero from wherever SFN began. Of
        metrics that are to rise no bound is known.
        """
        if self.paid or self.gain(self._of(newton=True)) <= 0 or self.sign > 0 or self.lowest < 0:
            return False
        reach = self.last_speed * self.newton_seconds
        return all(phase.before < reach for phase in self._of(newton=True))

    def verdict(self) -> str:
        """Whether SFN was worth its time, in one sentence."""
        gain, speed = self.gain(self._of(newton=True)), self.speed(newton=True)
        if not self.accepted_steps:
            tried = f": of {self.newton_steps} tried, none lowered the loss" if self.newton_steps else ""
            return f"SFN took no step{tried}."
        if not self._is_gain_known:
            return f"Whether SFN paid is not known: {self.monitor} was not seen both before and after its steps."
        if gain <= 0:
            return f"SFN did not pay: {self.monitor} did not improve with it."
        if not self.checks:
            return (
                f"SFN improved {self.monitor} by {gain:.4g}, {speed:.3g} per second; there is nothing to compare with."
            )
        checks = "last check" if self.checks == 1 else f"last {self.checks} checks"
        both = (
            f"improved {self.monitor} by {gain:.4g}, {speed:.3g} per second; {self.first_optimizer} had last made "
            f"{self.last_speed:.3g} per second ({checks})"
        )
        if self.is_undecided:
            return (
                f"SFN {both}, a rate that cannot have lasted (it leads below zero within SFN's "
                f"{self.newton_seconds:.4g} seconds), so the two cannot be compared by it."
            )
        return f"SFN {'paid' if self.paid else 'did not pay'}: it {both}."

    def metrics(self) -> dict[str, float]:
        """The sums as they are logged; without ``sfn/paid`` where the two cannot be compared."""
        paid = {} if self.is_undecided else {"sfn/paid": float(self.paid)}
        return {
            "sfn/seconds": self.newton_seconds,
            "sfn/first_seconds": self.first_seconds,
            "sfn/improvement_per_second": self.speed(newton=True),
            "sfn/first_improvement_per_second": self.speed(newton=False),
            "sfn/stalled_improvement_per_second": self.last_speed,
            "sfn/batch_gradients": float(sum(phase.gradients for phase in self._of(newton=True))),
            "sfn/first_batch_gradients": float(sum(phase.gradients for phase in self._of(newton=False))),
            "sfn/total_products": float(self.products),
            **paid,
        }

    # ------------------------------------------------------------------------------------------------ text

    def rows(self) -> list[tuple[str, ...]]:
        """The phases as rows of text."""
        return [
            (
                "SFN" if phase.newton else phase.optimizer,
                f"{phase.steps} ({phase.taken} taken)" if phase.newton else f"{phase.steps}",
                f"{phase.gradients}",
                f"{phase.products}",
                f"{phase.seconds:.1f}",
                _shown(phase.before),
                _shown(phase.after),
                f"{self.gain([phase]) / phase.seconds:.3g}" if phase.seconds > 0 else "",
            )
            for phase in self.phases
        ]

    def table(self) -> str:
        """The report as text: a table of the phases, the curvature where it was taken, and the verdict."""
        header = ("", "steps", "gradients", "Hv products", "seconds", f"{self.monitor}", "after", "per second")
        rows = [header, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        notes = [*self._last_step(), *self._clipping(), *self._curvature(), self.verdict()]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])

    def _last_step(self) -> list[str]:
        if self.last_step is None:
            return []
        before, after = self.last_step
        loss = "loss and weight decay" if self.has_penalty else "loss"
        to = f"about {after:.6g}, by {self.estimated_from}" if self.estimated_from else f"{after:.6g} on its batches"
        return [f"last Newton step: {loss} {before:.6g} to {to} ({self.monitor} may be older)"]

    def _clipping(self) -> list[str]:
        clipped = sum(phase.clipped for phase in self.phases)
        return [f"gradient clipped in {clipped} of {self.newton_steps} Newton steps (max_grad_norm)"] if clipped else []

    def _curvature(self) -> list[str]:
        at_switch, at_end = self.spectrum_at_switch, self.spectrum_at_end
        if at_switch is None or at_end is None:
            return []
        return [
            f"curvature {when}: from {spectrum.lambda_min:.3g} to {spectrum.lambda_max:.3g} (ratio "
            f"{_balance(spectrum):.2g}), gradient norm {spectrum.gradient_norm:.3g}"
            for when, spectrum in (("at the switch", at_switch), ("at the end", at_end))
        ]

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The report as plain numbers, lists and tensors, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SwitchReport":
        """The report that `state_dict` gave."""
        spectra = {name: state[name] for name in ("spectrum_at_switch", "spectrum_at_end")}
        restored = {name: Spectrum(**kept) if kept else None for name, kept in spectra.items()}
        return cls(**(state | restored | {"phases": [Phase(**phase) for phase in state["phases"]]}))


def _is_known(phase: Phase) -> bool:
    """Whether the metric tells what a phase improved. Where SFN took no step, that was not its doing."""
    by_newton = phase.taken > 0 and not phase.unseen
    return math.isfinite(phase.after - phase.before) and (by_newton or not phase.newton)


def _shown(metric: float) -> str:
    return "-" if math.isnan(metric) else f"{metric:.6g}"  # not logged yet


def _balance(spectrum: Spectrum) -> float:
    """Smallest over largest eigenvalue: how much negative curvature there is next to positive."""
    return spectrum.lambda_min / spectrum.lambda_max if spectrum.lambda_max != 0 else math.nan
