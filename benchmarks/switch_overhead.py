"""What `SwitchToSFN` costs before it switches, and where the time of a Newton step goes after it.

Before: in one run of the main recipe's network the callback is there in every other epoch, so that the machine's moods
meet both kinds alike; reported is the median over neighbouring pairs of epochs of the ratio of their CPU times
(``overhead``, with what Lightning spends on calling any callback's hooks), and what the callback's own code takes of
the time (``own_share``).
After: every call inside a step is timed; what is not a Hessian-vector product, a trial loss, a gradient, Lightning's
own pass over the data or reorthogonalisation is the remainder.

    python benchmarks/switch_overhead.py
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from engine_parts.timing import Clock
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from record import write
from torch.utils.data import DataLoader

from lightning_sfn import SwitchToSFN
from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.newton import krylov, optimizer, outer_step, step
from lightning_sfn.newton.curvature import HessianOperator
from lightning_sfn.newton.objective import Objective
from lightning_sfn.trainer.window import WindowedNewton

CASES, BATCH = 5000, 100
PAIRS, WARM_UP = 80, 4  # of epochs of 50 batches
SHARE_EPOCHS = 40


def make(callbacks: list[Callback], epochs: int) -> tuple[Trainer, LightningModule, DataLoader[Any]]:
    """The main recipe's network on random images."""
    seed_everything(0, verbose=False)
    loader = DataLoader(torch.rand(CASES, 100), batch_size=BATCH)  # type: ignore[arg-type]
    module = Autoencoder(sizes=[100, 64, 32, 16, 4])
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, module, loader


class Turns(Callback):
    """Takes the callbacks after it out of every other epoch, and notes the CPU seconds of each epoch."""

    def __init__(self) -> None:
        """Starts with nothing."""
        self.seconds: list[float] = []
        self.since = math.nan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes all callbacks."""
        self.all = list(trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One epoch ends and another begins."""
        now = time.process_time()
        self.seconds.append(now - self.since)
        self.since = now
        trainer.callbacks = self.all if trainer.current_epoch % 2 else [self]  # type: ignore[attr-defined]


def before() -> dict[str, Any]:
    """The cost of a callback that watches and never switches."""
    turns = Turns()
    trainer, module, loader = make([turns, SwitchToSFN(monitor="train_loss", patience=10**9)], 2 * PAIRS + WARM_UP + 1)
    trainer.fit(module, loader)
    seconds = turns.seconds[WARM_UP + 1 :]  # the first entry lies before the first epoch
    ratios = sorted(beside / plain for plain, beside in zip(seconds[::2], seconds[1::2], strict=True))
    spread = (ratios[-PAIRS // 4] - ratios[PAIRS // 4]) / 1.349  # a standard deviation, from the quartiles
    return {
        "pairs": PAIRS,
        "batches": CASES // BATCH,
        "seconds": statistics.median(seconds[::2]),
        "own_share": own_share(),
        "overhead": statistics.median(ratios) - 1,
        "standard_error": 1.2533 * spread / math.sqrt(PAIRS),
        "overhead_quartiles": [ratios[PAIRS // 4] - 1, ratios[-PAIRS // 4] - 1],
    }


class Timed(SwitchToSFN):
    """Counts the seconds of its own hooks, once the first epoch with its rehearsal is over."""

    own, start = 0.0, math.nan

    def _timed(self, hook: Callable[..., None], trainer: Trainer, *args: Any) -> None:
        start = time.perf_counter()
        hook(trainer, *args)
        self.own += (time.perf_counter() - start) * (trainer.current_epoch > 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the whole loop."""
        if trainer.current_epoch == 1:
            self.start = time.perf_counter()

    def on_train_batch_start(self, *args: Any) -> None:
        """Timed."""
        self._timed(super().on_train_batch_start, *args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Timed."""
        self._timed(super().on_before_optimizer_step, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        """Timed."""
        self._timed(super().on_train_batch_end, *args)

    def on_train_epoch_end(self, *args: Any) -> None:
        """Timed."""
        self._timed(super().on_train_epoch_end, *args)


def own_share() -> float:
    """Share of the training loop's time that the callback's own code takes before it switches."""
    watching = Timed(monitor="train_loss", patience=10**9)
    trainer, module, loader = make([watching], SHARE_EPOCHS)
    trainer.fit(module, loader)
    return watching.own / (time.perf_counter() - watching.start)


def after() -> dict[str, Any]:
    """Shares of a Newton step: ten steps on windows of an epoch, with the default optimizer."""
    clock = Clock(time.perf_counter)
    places = [
        (WindowedNewton, "_newton_step", "remainder"),
        (optimizer, "take_outer_step", "subspace algebra"),
        (krylov, "fill_basis", "reorthogonalisation"),
        (krylov._Extension, "add", "reorthogonalisation"),
        (HessianOperator, "_matvec", "Hessian-vector products"),
        (HessianOperator, "_build", "Hessian-vector products"),
        (step, "gradient_of", "gradients"),
        (outer_step, "gradient_of", "gradients"),
        (Objective, "value", "trial losses"),
    ]
    for place in places:
        clock.wrap(*place)
    switch = SwitchToSFN(switch_at_epoch=1, probe_dim=0)
    trainer, module, loader = make([switch], 6)
    try:
        trainer.fit(module, loader)
    finally:
        clock.unwrap()
    assert switch.report is not None
    total = sum(clock.seconds.values())
    return {
        "steps": switch.report.newton_steps,
        "seconds_per_step": total / switch.report.newton_steps,
        "shares": {name: seconds / total for name, seconds in sorted(clock.seconds.items())},
    }


def main() -> None:
    """Measures both and writes the results."""
    torch.set_num_threads(1)
    content = {"before": before(), "after": after()}
    path = write("switch_overhead", content)
    print(path.read_text())


if __name__ == "__main__":
    main()
