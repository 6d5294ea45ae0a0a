"""A run with `HessianSpectrum`, a TensorBoard server over its folder, and a browser: one of each for all tests."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_sfn import HessianSpectrum

from ..trainer.modules import Fitting, make_trainer, regression_loader, sgd
from .chromium import BROWSERS, Chromium, find_browser

EPOCHS = 4
RUN = "tiny"
_PATIENCE = 120.0  # seconds that TensorBoard may take to start


@dataclass(frozen=True)
class TensorBoard:
    """A running server."""

    url: str

    def get(self, path: str, **query: Any) -> bytes:
        """The body of an answer."""
        with urlopen(f"{self.url}{path}?{urlencode(query)}", timeout=30) as answer:
            return bytes(answer.read())

    def tags(self, plugin: str) -> set[str]:
        """The tags that a plugin has of the run."""
        return set(json.loads(self.get(f"data/plugin/{plugin}/tags")).get(RUN, {}))

    def points(self, plugin: str, tag: str, **query: Any) -> list[Any]:
        """What a plugin has under a tag of the run, in order of steps."""
        return json.loads(self.get(f"data/plugin/{plugin}/{plugin}", run=RUN, tag=tag, **query))

    def has_all(self) -> bool:
        """Whether the last number and the last picture of the run have been read."""
        if "train_loss" not in self.tags("scalars") or "hessian/density" not in self.tags("images"):
            return False
        numbers, pictures = self.points("scalars", "train_loss"), self.points("images", "hessian/density", sample=0)
        return len(numbers) == len(pictures) == EPOCHS


@pytest.fixture(scope="session")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HessianSpectrum]:
    """The folder of a run's logs and its callback."""
    folder = tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)
    spectrum = HessianSpectrum(every_n_epochs=1, krylov_dim=8, density=True, pictures_every=1)
    trainer = make_trainer(EPOCHS, callbacks=[spectrum], logger=TensorBoardLogger(folder, name=RUN, version=""))
    trainer.fit(Fitting(optimizer=sgd(0.2)), regression_loader())
    assert len(spectrum.history) == EPOCHS
    return folder, spectrum


@pytest.fixture(scope="session")
def history(logged: tuple[Path, HessianSpectrum]) -> list[tuple[int, Any]]:
    """The steps at which loggers put the spectra, and the spectra."""
    return [(step - 1, spectrum) for step, spectrum in logged[1].history]


@pytest.fixture(scope="session")
def tensorboard(
    logged: tuple[Path, HessianSpectrum], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TensorBoard]:
    """A server of the run's folder, started as people start it, that has read all of it."""
    output = tmp_path_factory.mktemp("tensorboard") / "output"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logged[0]), "--host", "127.0.0.1"]
    with output.open("wb") as log:
        process = subprocess.Popen([*command, "--port", "0"], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + _PATIENCE
        server = None
        while server is None or not server.has_all():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"TensorBoard did not serve the run: {output.read_text()}")
            time.sleep(0.2)
            if found := re.search(r"TensorBoard \S+ at (http://\S+)", output.read_text()):
                server = TensorBoard(found[1])
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A headless browser; without one the test is skipped."""
    executable = find_browser()
    if executable is None:
        pytest.skip(
            f"no browser on the PATH ({', '.join(BROWSERS)}): on Debian, apt-get install chromium-headless-shell"
        )
    browser = Chromium(executable, tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()
