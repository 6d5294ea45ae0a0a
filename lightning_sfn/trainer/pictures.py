"""What loggers other than for numbers can take: histograms and pictures."""

from typing import TYPE_CHECKING, Any

import numpy as np
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_histogram", "log_picture", "takes_pictures"]

_BINS = 100  # on each side of zero, which no bin reaches across; TensorBoard shows 30


def log_histogram(logger: Logger, tag: str, values: Tensor, step: int) -> None:
    """Writes a histogram to a logger that has them (TensorBoard); nothing to others.

    Args:
        logger: The logger.
        tag: Name of the histogram.
        values: Finite numbers, at least one.
        step: Place on the time axis.
    """
    experiment = _experiment(logger)
    if not hasattr(experiment, "add_histogram_raw"):
        return
    numbers = values.double().cpu().numpy()
    low, high = min(numbers.min(), 0.0), max(numbers.max(), 0.0)
    edges = np.unique(np.concatenate([np.linspace(low, 0.0, _BINS + 1), np.linspace(0.0, high or 1.0, _BINS + 1)]))
    counts, _ = np.histogram(numbers, edges)
    # `add_histogram` writes an empty bin first, and TensorBoard takes the least value for its left edge. Of the next
    # bin it then draws only what lies above this value: little, or nothing, of the most negative eigenvalue.
    experiment.add_histogram_raw(
        tag,
        min=edges[0],
        max=edges[-1],
        num=len(numbers),
        sum=numbers.sum(),
        sum_squares=numbers @ numbers,
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def takes_pictures(logger: Logger) -> bool:
    """Whether `log_picture` can write to a logger: TensorBoard, Weights & Biases, MLflow or Comet."""
    methods = ("add_figure", "log_figure")
    return hasattr(logger, "log_image") or any(hasattr(_experiment(logger), method) for method in methods)


def log_picture(logger: Logger, tag: str, figure: "Figure", step: int) -> None:
    """Writes a figure in the way of the logger's own library.

    Args:
        logger: A logger of which `takes_pictures` is true.
        tag: Name of the picture.
        figure: The figure.
        step: Place on the time axis.
    """
    experiment = _experiment(logger)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(tag, figure, step, close=False)
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=tag, images=[figure], step=step)
    elif hasattr(logger, "run_id"):  # MLflow
        experiment.log_figure(logger.run_id, figure, f"{tag}_{step:08d}.png")
    else:  # Comet
        experiment.log_figure(figure_name=tag, figure=figure, step=step)


def _experiment(logger: Logger) -> Any:
    return getattr(logger, "experiment", None)
