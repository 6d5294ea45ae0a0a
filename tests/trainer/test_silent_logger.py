"""Loggers are silent in replays, but tell where they write."""

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_sfn import HessianSpectrum
from lightning_sfn.trainer.isolation import isolated

from .modules import Fitting, MemoryLogger, forced, make_trainer, regression_loader

_SEEN: list[tuple[Any, ...]] = []  # outside of the module, so that replays leave their traces in it


class Writing(Fitting):
    """Writes a file into the directory of its logger, whose kind and whose details it asks for."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logger = self.logger
        assert isinstance(logger, (CSVLogger, TensorBoardLogger))
        Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
        Path(logger.log_dir, "step").write_text("x")
        _SEEN.append(
            (type(logger).__name__ != "SilentLogger", logger.log_dir, self.trainer.log_dir, logger.name, logger.version)
        )
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_step_that_asks_for_paths_hears_in_replays_what_it_hears_in_training(kind: Any, tmp_path: Path) -> None:
    _SEEN.clear()
    switch = forced(switch_at_epoch=1)
    callbacks = [HessianSpectrum(log=False, krylov_dim=4, strict=True), switch]
    make_trainer(2, callbacks=callbacks, logger=kind(tmp_path)).fit(Writing(), regression_loader())
    assert switch.report is not None
    assert switch.report.newton_steps == 1
    assert {own for own, *_ in _SEEN} == {True, False}  # both in training and in replays
    assert len({rest for _, *rest in map(tuple, _SEEN) for rest in [tuple(rest)]}) == 1


def test_what_a_step_writes_is_swallowed() -> None:
    class Chatty(MemoryLogger):
        def __init__(self) -> None:
            super().__init__()
            self.run_id, self.where = "a7", Path("runs")

        def log_image(self, image: Any) -> None:
            self.written.append(image)

    logger = Chatty()
    trainer = make_trainer(1, logger=logger)
    with isolated(trainer, Fitting()):
        (silent,) = trainer.loggers
        assert isinstance(silent, Chatty)
        assert (silent.run_id, silent.where, silent.name, silent.version) == ("a7", Path("runs"), "memory", 0)
        assert silent.save_dir is logger.save_dir
        assert silent.group_separator == logger.group_separator
        silent.log_metrics({"a": 1.0}, step=1)
        silent.log_image(1)
        silent.experiment.append(1)
        silent.no_such_thing()
        assert "__wrapped__" not in dir(silent)
    assert trainer.loggers == [logger]
    assert not logger.rows
    assert not logger.written
