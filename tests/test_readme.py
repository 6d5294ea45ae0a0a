"""The README's code runs, and its tables are those of the results files."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


class Regression(LightningModule):
    """A module of somebody who has never heard of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Rows(LightningDataModule):
    """Random rows."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(12, 3), batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_the_code_of_the_readme_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 8}
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    trainer = partial(Trainer, default_root_dir=tmp_path, log_every_n_steps=1, num_sanity_val_steps=0, **quiet)
    monkeypatch.setattr("pytorch_lightning.Trainer", trainer)
    namespace = {
        "Trainer": trainer,
        "datamodule": Rows(),
        "inputs": torch.randn(20, 3),
        "targets": torch.randn(20, 2),
        "loss_fn": nn.MSELoss(),
        "model": Regression() if "trainer.fit" in block else model,
    }
    exec(block, namespace)
    if "trainer" in namespace and "trainer.fit" in block:
        assert namespace["trainer"].callback_metrics["train_loss"] < 10  # type: ignore[attr-defined]


def test_the_readme_fits_three_screens() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 3 * 45
    assert all(len(line) <= 120 or line.startswith("| ") for line in lines)


def test_every_seed_of_the_main_recipe_escaped() -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "autoencoder_escape.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2, 3, 4]
    assert all(run["final"] < 0.8 * run["plateau"] for run in runs)
    assert all(run["lambda_min"][0] < 0 for run in runs)


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
