"""The code of the pages runs, and their links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from lightning_sfn.newton.trust_region import RULES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_of_the_pages_runs(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_sfn.newton.trust_region.RULES", dict(RULES))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    names: dict[str, Any] = {"model": model, "inputs": torch.randn(20, 3), "targets": torch.randn(20, 2)}
    here = {"devices": 1, "accelerator": "cpu", "default_root_dir": tmp_path}  # wherever the page trains
    monkeypatch.setattr("pytorch_lightning.Trainer", lambda **options: Trainer(**(options | here)))
    exec(block, names | {"loss_fn": nn.MSELoss()})


def test_extensions_take_less_than_thirty_lines() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    assert all(len(block.splitlines()) < 30 for block in blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
