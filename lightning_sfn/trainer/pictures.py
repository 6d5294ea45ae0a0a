"""What loggers other than for numbers can take: histograms and pictures."""

from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import Logger
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_histogram", "log_picture", "takes_pictures"]


def log_histogram(logger: Logger, tag: str, values: Tensor, step: int) -> None:
    """Writes a histogram to a logger that has them (TensorBoard); nothing to others.

    Args:
        logger: The logger.
        tag: Name of the histogram.
        values: Finite numbers, at least one.
        step: Place on the time axis.
    """
    add_histogram = getattr(_experiment(logger), "add_histogram", None)
    if add_histogram is not None:
        add_histogram(tag, values, step)


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
