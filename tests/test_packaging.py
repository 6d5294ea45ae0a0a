"""What the package metadata promises agrees with the files, and a wheel works outside of the repository."""

import os
import re
import shutil
import subprocess
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the package, installed from a wheel that was built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("lightning_sfn", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (wheel,) = folder.glob("*.whl")
    pip("install", str(wheel), "--no-deps", "--target", str(folder / "site"))
    return folder / "site"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", arguments[0], "--no-index"]
    done = subprocess.run([*command, *arguments[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def outside(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with that folder before every other, in the empty folder of the test."""
    environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def test_a_wheel_holds_what_the_checkout_has(installed: Path) -> None:
    package = {path.relative_to(ROOT) for path in (ROOT / "lightning_sfn").rglob("*") if path.is_file()}
    wanted = {path for path in package if path.suffix != ".pyc"}
    wanted |= {Path("lightning_sfn/recipes", path.name) for path in (ROOT / "recipes").glob("*.yaml")}
    assert Path("lightning_sfn/py.typed") in wanted
    assert [path for path in sorted(wanted) if not (installed / path).is_file()] == []
    (metadata,) = installed.glob("lightning_sfn-*.dist-info")
    assert metadata.name == f"lightning_sfn-{__version__}.dist-info"
    assert (metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    samples = {path.parent for path in wanted if path.suffix in (".parquet", ".txt")}
    assert samples
    assert all("icen" in (installed / sample / "README.md").read_text() for sample in samples)


def test_the_installed_package_is_the_one_that_is_imported(installed: Path) -> None:
    code = "import lightning_sfn; from lightning_sfn.experiments.recipes import shipped_recipes; "
    done = outside(installed, "-c", code + "print(lightning_sfn.__file__, *shipped_recipes().values())")
    package, *recipes = done.stdout.split()
    assert Path(package).is_relative_to(installed), done.stderr
    assert [Path(recipe).name for recipe in recipes] == sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
    assert all(Path(recipe).is_relative_to(installed) for recipe in recipes)


def test_the_installed_command_trains_from_a_recipe_without_a_warning_of_ours(installed: Path) -> None:
    command = str(installed / "bin" / "lightning-sfn")
    helped = outside(installed, command, "--help")
    assert helped.returncode == 0, helped.stderr
    assert "spectrum" in helped.stdout
    done = outside(installed, "-W", "always", command, "fit", "-c", "autoencoder", "--trainer.fast_dev_run=1")
    assert done.returncode == 0, done.stderr
    assert "max_steps=1" in done.stdout + done.stderr
    ours = re.escape(str(installed / "lightning_sfn"))
    assert re.findall(rf"^{ours}.*Warning.*", done.stderr, flags=re.MULTILINE) == []
