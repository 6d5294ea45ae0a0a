"""The code of the pages runs, and their links lead somewhere."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from lightning_sfn import cli
from lightning_sfn.experiments.recipes import shipped_recipes
from lightning_sfn.newton.trust_region import RULES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CODE = [
    (page.stem, block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
]
BLOCKS = [pytest.param(block, id=f"{page}-{number}") for number, (page, block) in enumerate(CODE)]


def run(block: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Runs a block; gives what it defined."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("lightning_sfn.newton.trust_region.RULES", dict(RULES))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    names: dict[str, Any] = {"model": model, "inputs": torch.randn(20, 3), "targets": torch.randn(20, 2)}
    here = {"devices": 1, "accelerator": "cpu", "default_root_dir": folder}  # wherever the page trains
    monkeypatch.setattr("pytorch_lightning.Trainer", lambda **options: Trainer(**(options | here)))
    names |= {"loss_fn": nn.MSELoss()}
    exec(block, names)
    return names


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_of_the_pages_runs(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(block, monkeypatch, tmp_path)


def test_the_first_run_leaves_its_saddle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (block,) = (block for page, block in CODE if page == "getting_started" and "SwitchToSFN" in block)
    names = run(block, monkeypatch, tmp_path)
    report = names["switch"].report
    assert report.phases[0].after > 2.0  # where SGD stayed
    assert names["trainer"].callback_metrics["train_loss"] < 1e-6


def test_the_page_of_recipes_names_each_of_them() -> None:
    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "recipes.md").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(shipped_recipes())


COMMANDS = re.findall(r"^lightning-sfn (fit .*)$", (DOCS / "recipes.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS)
def test_the_commands_of_the_page_of_recipes_parse(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-sfn", *words.split(), "--print_config"])
    with pytest.raises(SystemExit) as exit_request:
        cli.main()
    assert not exit_request.value.code


def test_the_page_of_equations_names_what_exists() -> None:
    names = re.findall(r"`newton\.([\w.]+)`", (DOCS / "mathematics.md").read_text())
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(f"lightning_sfn.newton.{module}"), attribute), name


def test_extensions_take_less_than_thirty_lines() -> None:
    blocks = [block for page, block in CODE if page == "extending"]
    assert len(blocks) == 3
    assert all(len(block.splitlines()) < 30 for block in blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_find_what_they_link_inside_the_documentation(page: Path) -> None:
    """`make docs` takes anything else for an error."""
    assert not re.findall(r"\]\((?!https?:)(\.\./[^)]*)\)", page.read_text())
