"""What the package metadata promises agrees with the files."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_sfn
from lightning_sfn.version import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pyproject() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "lightning_sfn").rglob("__init__.py")}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == found | {"lightning_sfn.recipes"}


def test_every_dependency_is_pinned_for_every_python(pyproject: dict[str, Any]) -> None:
    pins = [re.split(r"[=; ]", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert pins
    extras = pyproject["project"]["optional-dependencies"]
    wanted = [*pyproject["project"]["dependencies"], *(name for extra in extras.values() for name in extra)]
    names = {re.split(r"[\[<>=]", name)[0].lower() for name in wanted} - {"lightning-sfn"}
    assert names <= set(pins)


def test_version_is_single_sourced(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["dynamic"] == ["version"]
    assert lightning_sfn.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
