"""Messages to whoever watches a run."""

from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only

__all__ = ["say"]


@rank_zero_only
def say(trainer: Trainer, text: str) -> None:
    """Shows a message above the progress bar, where there is one; a plain log line would be drawn over."""
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False) and _is_open(bar):
        bar.print(text)
    else:
        rank_zero_info(text)


def _is_open(bar: Any) -> bool:
    """Whether a progress bar prints what it is told to: tqdm's drops it once all of its bars are closed."""
    names = [f"_{stage}_progress_bar" for stage in ("train", "val", "test", "predict")]
    bars = [getattr(bar, name) for name in names if hasattr(bar, name)]
    return not bars or any(each is not None and not each.disable for each in bars)
