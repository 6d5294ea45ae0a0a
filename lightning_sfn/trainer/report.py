"""What a switch to SFN gained and what it cost."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_sfn.newton.spectrum import Spectrum

__all__ = ["SwitchReport", "say"]


@rank_zero_only
def say(trainer: Trainer, text: str) -> None:
    """Shows a message above the progress bar, where there is one; a plain log line would be drawn over.

    Args:
        trainer: The Trainer whose bar it is.
        text: The message.
    """
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        rank_zero_info(text)


@dataclass
class SwitchReport:
    """Numbers of one switched run; filled in while it goes on.

    Attributes:
        monitor: Name of the monitored metric.
        first_optimizer: Class name of the optimizer that stalled.
        plateau: The metric when the switch was decided.
        final: The metric at the end.
        first_steps: Optimizer steps before the switch.
        first_seconds: Seconds of training before the switch.
        newton_steps: Newton steps tried.
        accepted_steps: Newton steps that lowered the trial loss.
        newton_seconds: Seconds of training since the switch, first-order passes over the data included.
        products: Hessian-vector products.
        spectrum_at_switch: Spectrum on the curvature batches of the first Newton step.
        spectrum_at_end: Spectrum on those of the last one, at the final parameters.
    """

    monitor: str
    first_optimizer: str
    plateau: float
    final: float = float("nan")
    first_steps: int = 0
    first_seconds: float = 0.0
    newton_steps: int = 0
    accepted_steps: int = 0
    newton_seconds: float = 0.0
    products: int = 0
    spectrum_at_switch: Spectrum | None = field(default=None, repr=False)
    spectrum_at_end: Spectrum | None = field(default=None, repr=False)

    def state_dict(self, newton_seconds: float) -> dict[str, Any]:
        """The report as plain numbers, lists and tensors, for checkpoints.

        Args:
            newton_seconds: Seconds since the switch, as of now.
        """
        return asdict(replace(self, newton_seconds=newton_seconds))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SwitchReport":
        """The report that `state_dict` gave."""
        spectra = {name: state[name] for name in ("spectrum_at_switch", "spectrum_at_end")}
        return cls(**(state | {name: Spectrum(**kept) if kept else None for name, kept in spectra.items()}))

    def rows(self) -> list[tuple[str, str, str]]:
        """The report as rows: what, at the switch (or before it), at the end (or since it)."""
        at_switch, at_end = self.spectrum_at_switch, self.spectrum_at_end
        rows = [
            (self.monitor, f"{self.plateau:.4f}", f"{self.final:.4f}"),
            ("optimizer", self.first_optimizer, "SaddleFreeNewton"),
            ("steps", f"{self.first_steps}", f"{self.newton_steps} ({self.accepted_steps} taken)"),
            ("seconds", f"{self.first_seconds:.1f}", f"{self.newton_seconds:.1f}"),
            ("Hessian-vector products", "0", f"{self.products}"),
        ]
        if at_switch is not None and at_end is not None:
            rows += [
                ("smallest eigenvalue", f"{at_switch.lambda_min:.3g}", f"{at_end.lambda_min:.3g}"),
                ("largest eigenvalue", f"{at_switch.lambda_max:.3g}", f"{at_end.lambda_max:.3g}"),
                ("smallest / largest", f"{_balance(at_switch):.2g}", f"{_balance(at_end):.2g}"),
                ("gradient norm", f"{at_switch.gradient_norm:.3g}", f"{at_end.gradient_norm:.3g}"),
            ]
        return rows

    def table(self) -> str:
        """The report as a text table."""
        rows = [("", "until the switch", "with SFN"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _balance(spectrum: Spectrum) -> float:
    """Smallest over largest eigenvalue: how much negative curvature there is next to positive."""
    return spectrum.lambda_min / spectrum.lambda_max if spectrum.lambda_max != 0 else float("nan")
