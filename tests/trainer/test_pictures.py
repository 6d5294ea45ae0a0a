"""Each logger gets pictures and histograms in the way of its own library, and nothing that it cannot take."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sfn import HessianSpectrum
from lightning_sfn.trainer.pictures import log_histogram, log_picture, takes_pictures

from .modules import Fitting, MemoryLogger, make_trainer, regression_loader

CALLBACK = "lightning_sfn.trainer.callbacks.spectrum"
PICTURES = ["hessian/ritz_values", "hessian/index_against_loss"]


class MLflowClient:
    """Takes figures as `mlflow.MlflowClient` does."""

    def __init__(self) -> None:
        self.figures: list[tuple[str, Any, str]] = []

    def log_figure(self, run_id: str, figure: Any, artifact_file: str, *, save_kwargs: Any = None) -> None:
        self.figures.append((run_id, figure, artifact_file))


class LikeMLflow(MemoryLogger):
    def __init__(self) -> None:
        super().__init__()
        self.client, self.run_id = MLflowClient(), "run 7"

    @property
    def experiment(self) -> Any:
        return self.client


class LikeWandb(MemoryLogger):
    """Its run has `log` alone; pictures go through the logger."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, list[Any], int | None]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert isinstance(images, list)
        assert not kwargs
        self.images.append((key, images, step))


class CometExperiment:
    """Takes figures as `comet_ml.Experiment` does."""

    def __init__(self) -> None:
        self.figures: list[tuple[Any, Any, bool, Any]] = []

    def log_figure(
        self, figure_name: str | None = None, figure: Any = None, overwrite: bool = False, step: int | None = None
    ) -> None:
        self.figures.append((figure_name, figure, overwrite, step))


class LikeComet(MemoryLogger):
    def __init__(self) -> None:
        super().__init__()
        self.comet = CometExperiment()

    @property
    def experiment(self) -> Any:
        return self.comet


def fit(spectrum: HessianSpectrum, logger: Any, epochs: int = 1) -> None:
    make_trainer(epochs, callbacks=[spectrum], logger=logger).fit(Fitting(), regression_loader())


def test_every_library_gets_pictures_in_its_own_way() -> None:
    """All of them at once, beside loggers that take none; the place is that of the scalars."""
    mlflow, wandb, comet, memory = LikeMLflow(), LikeWandb(), LikeComet(), MemoryLogger()
    fit(HessianSpectrum(krylov_dim=4), [memory, mlflow, CSVLogger("."), wandb, comet])
    ((place, _),) = memory.values("hessian/loss")
    for logger in (mlflow, wandb, comet):
        assert logger.values("hessian/lambda_max") == memory.values("hessian/lambda_max")
    assert [(run, name) for run, _, name in mlflow.client.figures] == [
        ("run 7", f"{tag}_{place:08d}.png") for tag in PICTURES
    ]
    assert [(key, step, len(images)) for key, images, step in wandb.images] == [(tag, place, 1) for tag in PICTURES]
    assert [(name, overwrite, step) for name, _, overwrite, step in comet.comet.figures] == [
        (tag, False, place) for tag in PICTURES
    ]
    drawn = [f for _, f, _ in mlflow.client.figures] + [f for _, f, *_ in comet.comet.figures]
    assert all(isinstance(figure, Figure) for figure in (*drawn, *(f for _, (f,), _ in wandb.images)))
    assert all(figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel() for figure in drawn)


def test_who_takes_pictures_and_histograms() -> None:
    board, csv = TensorBoardLogger("board"), CSVLogger("csv")
    takers = {type(x).__name__: takes_pictures(x) for x in (board, csv, MemoryLogger(), LikeMLflow(), LikeWandb())}
    assert takers == {
        "TensorBoardLogger": True,
        "CSVLogger": False,
        "MemoryLogger": False,
        "LikeMLflow": True,
        "LikeWandb": True,
    }
    for logger in (csv, MemoryLogger(), LikeComet()):
        log_histogram(logger, "nothing", torch.ones(2), 0)
    board.experiment.close()


def test_tensorboard_keeps_the_figure_open() -> None:
    """One figure goes to several loggers."""
    logger, figure = TensorBoardLogger(".", name="", version=""), Figure()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.subplots().plot([0, 1])
    for step in (3, 4):
        log_picture(logger, "one", figure, step)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("one")] == [3, 4]


def test_tensorboard_shows_pictures_of_a_run_with_density() -> None:
    logger = TensorBoardLogger(".", name="", version="")
    fit(HessianSpectrum(krylov_dim=6, density=True, density_probes=2, pictures_every=2), logger, epochs=4)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    places = [point.step for point in events.Scalars("hessian/loss")]
    assert len(places) == 4
    for tag in (*PICTURES, "hessian/density"):
        images = events.Images(tag)
        assert [image.step for image in images] == [places[0], places[2], places[3]]  # every second one, and the last
        assert all((image.width, image.height) == (640, 420) for image in images)
        assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)
        assert len({image.encoded_image_string for image in images}) == 3
    for tag in ("hessian/eigenvalues", "hessian/eigenvalues_signed_log"):
        assert [point.step for point in events.Histograms(tag)] == places


@pytest.mark.parametrize(
    ("every", "epochs", "expected"), [(0, 3, []), (1, 3, [0, 1, 2]), (5, 3, [0, 2]), (2, 3, [0, 2])]
)
def test_how_often_pictures_are_drawn(every: int, epochs: int, expected: list[int]) -> None:
    logger = LikeWandb()
    fit(HessianSpectrum(krylov_dim=2, tol=None, pictures_every=every), logger, epochs)
    places = [step for step, _ in logger.values("hessian/loss")]
    assert [step for key, _, step in logger.images if key == PICTURES[0]] == [places[i] for i in expected]
    points = [
        len(images[0].axes[0].collections[0].get_offsets()) for key, images, _ in logger.images if key == PICTURES[1]
    ]
    assert points == [i + 1 for i in expected]  # it grows over the run


def test_without_matplotlib_the_numbers_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(f"{CALLBACK}.find_spec", lambda name: None if name == "matplotlib" else name)
    logger = LikeWandb()
    with caplog.at_level(logging.INFO):
        fit(HessianSpectrum(krylov_dim=2, tol=None, pictures_every=1), logger, epochs=3)
    assert len(logger.values("hessian/loss")) == 3
    assert logger.images == []
    said = [record.getMessage() for record in caplog.records if "matplotlib" in record.getMessage()]
    assert said == ['HessianSpectrum draws no pictures without matplotlib: pip install "lightning-sfn[plot]".']


def test_nothing_is_written_but_by_loggers(empty_folder: Path) -> None:
    fit(HessianSpectrum(krylov_dim=2, density=True, log=False), False)
    assert list(empty_folder.iterdir()) == []
