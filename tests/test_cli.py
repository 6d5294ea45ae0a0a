"""The command: what it builds from a recipe, what it says when something is wrong, and one real run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sfn import cli
from lightning_sfn.experiments.recipes import shipped_recipes

RECIPE = shipped_recipes()["autoencoder"]


class Command:
    """Runs `main` in this process, as if the words stood on a command line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["lightning-sfn", *words])
        try:
            status = cli.main()
        except SystemExit as exit_request:
            status = int(exit_request.code or 0)
        out, err = self.capsys.readouterr()
        return status, out, err

    def fails(self, *words: str) -> tuple[int, str]:
        """Return the status and the one line of standard error that the command wrote."""
        status, _, err = self(*words)
        said = [line for line in err.splitlines() if line.startswith("lightning-sfn: ")]
        assert len(said) == 1
        assert "Traceback" not in err
        assert "usage:" not in err
        return status, said[0]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def edited_recipe(folder: Path, old: str, new: str) -> str:
    text = RECIPE.read_text()
    assert old in text
    path = folder / "edited.yaml"
    path.write_text(text.replace(old, new))
    return str(path)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_recipe_parses_from_any_folder(command: Command, name: str) -> None:
    status, out, _ = command("fit", "-c", name, "--print_config")
    assert status == 0
    assert str(shipped_recipes()[name]) in sys.argv
    assert set(yaml.safe_load(out)) >= {"seed_everything", "model", "data", "trainer"}


def test_printed_configuration_holds_recipe_and_overrides(command: Command) -> None:
    status, out, _ = command(
        "fit",
        "-c",
        "recipes/autoencoder.yaml",
        "--data.image_size",
        "14",
        "--model.sizes",
        "[196,8]",
        "--trainer.callbacks+=LearningRateMonitor",
        "--print_config",
    )
    config: dict[str, Any] = yaml.safe_load(out)
    assert status == 0
    assert config["seed_everything"] == 0
    assert config["model"]["class_path"] == "lightning_sfn.experiments.autoencoder.Autoencoder"
    assert config["model"]["init_args"]["sizes"] == [196, 8]
    assert config["data"]["init_args"]["image_size"] == 14
    callbacks = [entry["class_path"].rpartition(".")[2] for entry in config["trainer"]["callbacks"]]
    assert callbacks[0] == "SwitchToSFN"
    assert callbacks[-1] == "LearningRateMonitor"


def test_short_names_without_a_recipe(command: Command) -> None:
    status, out, _ = command(
        "fit",
        "--model",
        "Autoencoder",
        "--model.optimizer",
        "SaddleFreeNewton",
        "--data",
        "MNISTDataModule",
        "--trainer.callbacks",
        "HessianSpectrum",
        "--trainer.logger",
        "TensorBoardLogger",
        "--trainer.logger.save_dir",
        "runs",
        "--print_config",
    )
    config = yaml.safe_load(out)
    assert status == 0
    assert config["seed_everything"] == 0
    assert config["model"]["init_args"]["optimizer"]["class_path"].endswith("SaddleFreeNewton")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("monitor: train_loss", "monitr: train_loss", "SwitchToSFN has no option 'monitr'; did you mean 'monitor'?"),
        ("class_path: SwitchToSFN", "class_path: Nobody", "there is no class 'Nobody'"),
        ("image_size: 10", "image_size: 100", "image_size must be an integer from 1 to 28"),
        ("max_epochs: 140", "max_epochs: many", "trainer.max_epochs: expected int, got 'many'"),
        ("trainer:", "trainr:", "does not accept option 'trainr."),
        ("model:", "model: [", "Problems parsing config"),
    ],
)
def test_mistakes_in_a_recipe(command: Command, tmp_path: Path, old: str, new: str, said: str) -> None:
    status, line = command.fails("fit", "-c", edited_recipe(tmp_path, old, new))
    assert status == 2
    assert said in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fit", "-c", "autoencodr"), "There is no recipe 'autoencodr'"),
        (("fit", "-c", "autoencoder", "--foo", "3"), "unrecognized arguments: --foo 3"),
        (("fit", "-c", "autoencoder", "--trainer.strategy", "foo"), "invalid strategy name"),
        (("fitt",), "invalid choice: 'fitt'"),
        ((), 'expected "subcommand" to be one of {fit,validate,test,predict}'),
    ],
)
def test_mistakes_on_the_command_line(command: Command, words: tuple[str, ...], said: str) -> None:
    status, line = command.fails(*words)
    assert status == 2
    assert said in line


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.parquet", "The data source 'nowhere.parquet' does not exist"),
        ("somebody/something", "or get online once to fill the cache"),
    ],
)
def test_missing_data(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, said: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    status, line = command.fails("fit", "-c", "autoencoder", "--data.source", source)
    assert status == 1
    assert said in line


def test_missing_packages_are_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else name)
    status, line = command.fails("fit", "-c", "autoencoder")
    assert status == 2
    assert line.endswith('(rich): pip install "lightning-sfn[all]".')


def test_a_short_run_in_a_process_of_its_own(empty_folder: Path) -> None:
    words = [
        "fit",
        "-c",
        "autoencoder",
        "--trainer.max_epochs",
        "1",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.limit_train_batches",
        "3",
        "--trainer.limit_val_batches",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sfn.cli", *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "tensorboard --logdir runs/autoencoder" in done.stdout
    written = {path.name for path in (empty_folder / "runs" / "autoencoder" / "version_0").iterdir()}
    assert "config.yaml" in written
    assert any(name.startswith("events.out.tfevents") for name in written)


@pytest.mark.parametrize("name", ["fig1", "fig3", "fig4_recurrent"])
def test_the_papers_recipes_train(command: Command, name: str) -> None:
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
    status, _, err = command("fit", "-c", name, "--trainer.fast_dev_run=1", *quiet)
    assert status == 0, err


def test_the_papers_autoencoder_trains_at_a_smaller_size(command: Command) -> None:
    small = ("--model.sizes=[100,30,15]", "--data.image_size=10", "--trainer.accelerator=cpu")
    status, _, err = command("fit", "-c", "fig4_autoencoder", "--trainer.fast_dev_run=1", *small)
    assert status == 0, err
