"""The command: what it builds from a recipe, what it says when something is wrong, and one real run."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image
from PIL import Image as PillowImage
from pytorch_lightning import Trainer

from lightning_sfn import HessianSpectrum, Spectrum, cli
from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.mnist import MNISTDataModule
from lightning_sfn.experiments.recipes import shipped_recipes

RECIPE = shipped_recipes()["autoencoder"]


class Command:
    """Runs `main` in this process, as if the words stood on a command line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(sys, "path", list(sys.path))  # to which the command adds the working directory
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
        (("fit", "-c", "autoencoder", "--foo", "3"), "nrecognized arguments: --foo 3"),
        (("fit", "-c", "autoencoder", "--trainer.strategy", "foo"), "invalid strategy name"),
        (("fitt",), "there is no command 'fitt': choose one of fit, validate, test, predict, spectrum, reproduce."),
        ((), "a command is expected, one of fit, validate, test, predict, spectrum, reproduce"),
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


def test_a_folder_for_logs_that_cannot_be_one(command: Command) -> None:
    Path("file").write_text("")
    logs = ("--trainer.logger.init_args.save_dir", "file/logs")
    status, line = command.fails("fit", "-c", "autoencoder", *logs, "--trainer.max_epochs", "1")
    assert status == 1
    assert line.endswith("file/logs cannot be used: Not a directory.")


def test_modules_in_the_working_directory_are_found(command: Command, empty_folder: Path) -> None:
    words = "from pytorch_lightning import LightningModule\n\n\nclass Own(LightningModule):\n    pass\n"
    (empty_folder / "module_beside_the_recipe.py").write_text(words)
    (empty_folder / "own.yaml").write_text("model: {class_path: module_beside_the_recipe.Own}\n")
    status, out, err = command("fit", "-c", "own.yaml", "--print_config")
    assert status == 0, err
    assert "class_path: module_beside_the_recipe.Own" in out


def test_missing_packages_are_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else name)
    status, line = command.fails("fit", "-c", "autoencoder")
    assert status == 2
    assert line.endswith('(rich): install the extra "all", by pip install ".[all]" in the repository.')


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


# ------------------------------------------------------------------------------------------------ spectrum

SIZES = (16, 4)


@dataclass
class Trained:
    """A short run: its data, its checkpoint, and the spectrum at its end on all of the data."""

    data: list[str]
    folder: Path
    spectrum: Spectrum
    verdict: str

    def words(self, *more: str, checkpoint: str = "last.ckpt") -> list[str]:
        """The command that looks at the checkpoint."""
        model = ["--model.sizes", str(list(SIZES)), "--num_batches", "3", "--precision", "64", "--krylov_dim", "20"]
        return [
            "spectrum",
            "-c",
            "autoencoder",
            *self.data,
            *model,
            "--ckpt_path",
            str(self.folder / checkpoint),
            *more,
        ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two epochs on 24 images, the whole of them in three batches."""
    folder = tmp_path_factory.mktemp("trained")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)
    images = {"image": [PillowImage.fromarray(image) for image in pixels]}
    for split in ("train", "test"):
        Dataset.from_dict(images, features=Features({"image": Image()})).to_parquet(folder / f"{split}.parquet")
    torch.manual_seed(0)
    data = MNISTDataModule(source=folder, image_size=4, batch_size=8)
    callback = HessianSpectrum(
        every_n_epochs=2, krylov_dim=20, num_batches=3, smallest=5, largest=5, tol=1e-3, precision=64, log=False
    )
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], enable_checkpointing=False, log_every_n_steps=1, **quiet
    )
    trainer.fit(Autoencoder(SIZES, linear_code=False), data)
    trainer.save_checkpoint(folder / "last.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    assert callback.last is not None
    options = ["--data.source", str(folder), "--data.image_size", "4", "--data.batch_size", "8"]
    return Trained([*options, "--trainer.max_epochs", "2"], folder, callback.last, callback.verdict)


def test_spectrum_of_a_checkpoint(command: Command, trained: Trained, empty_folder: Path) -> None:
    """The table, the file and the picture hold what the callback saw, and nothing else is written."""
    files = ["--output", "out/spectrum.json", "--plot", "out/spectrum.png"]
    status, out, err = command(*trained.words(*files, "--density", "true", "--density_probes", "2"))
    assert status == 0
    assert "Hessian-vector products (at most)" in err
    spectrum, expected = Spectrum.load("out/spectrum.json"), trained.spectrum
    for name in ("loss", "gradient_norm", "lambda_min", "lambda_max"):
        assert getattr(spectrum, name) == pytest.approx(getattr(expected, name), rel=1e-7)
    for (name, value, _), (also, wanted, _) in zip(spectrum.extremes(5, 5), expected.extremes(5, 5), strict=True):
        assert name == also
        assert value == pytest.approx(wanted, rel=1e-7)
        assert f"{name} " in out
        assert f"{value:.6g}" in out
    for shown in (f"{spectrum.loss:.6g}", f"{spectrum.gradient_norm:.4g}", f"{spectrum.products}", "(density)"):
        assert shown in out
    assert spectrum.density is not None
    notes = json.loads(Path("out/spectrum.json").read_text())
    assert notes["verdict"] in out
    assert notes["verdict"].partition(":")[0] == trained.verdict.partition(":")[0]
    assert notes["checkpoint"].endswith("last.ckpt")
    assert (notes["curvature"], notes["num_batches"]) == ("hessian", 3)
    with PillowImage.open("out/spectrum.png") as picture:
        assert picture.size == (1320, 504)
    assert sorted(path.name for path in empty_folder.rglob("*")) == ["out", "spectrum.json", "spectrum.png"]


def test_spectrum_of_weights_alone_with_gauss_newton(command: Command, trained: Trained) -> None:
    words = trained.words("--curvature", "gauss_newton", "--output", "spectrum.json", checkpoint="weights.ckpt")
    status, out, _ = command(*words)
    assert status == 0
    spectrum = Spectrum.load("spectrum.json")
    assert spectrum.lambda_min >= -1e-12 * spectrum.lambda_max
    assert spectrum.loss == pytest.approx(trained.spectrum.loss, rel=1e-9)
    assert "cannot tell a saddle from a minimum" in out


def test_spectrum_keeps_files_unless_told_otherwise(command: Command, trained: Trained) -> None:
    Path("spectrum.json").write_text("mine")
    status, line = command.fails(*trained.words("--output", "spectrum.json"))
    assert status == 1
    assert "spectrum.json exists: choose another name, or replace it with overwrite=True." in line
    assert Path("spectrum.json").read_text() == "mine"
    status, _, _ = command(*trained.words("--output", "spectrum.json", "--overwrite", "true"))
    assert status == 0
    assert Spectrum.load("spectrum.json").size == 16 * 4 * 2 + 4 + 16


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--model.sizes", "[16,5]"), 1, "last.ckpt does not fit Autoencoder"),
        (("--ckpt_path", "nowhere.ckpt"), 1, "There is no checkpoint nowhere.ckpt"),
        (("--ckpt_path", "text.ckpt"), 1, "text.ckpt is not a checkpoint that can be read"),
        (("--ckpt_path", "tensor.ckpt"), 1, "tensor.ckpt is not a checkpoint that can be read"),
        (("--num_batches", "0"), 2, "num_batches is 0"),
        (("--krylov_dim", "0"), 2, "krylov_dim is 0"),
        (("--tol", "2"), 2, "tol is 2"),
        (("--plot", "spectrum.txt"), 2, "plot is spectrum.txt"),
        (("--trainer.limit_train_batches", "0"), 1, "The training data loader is empty"),
        (("--curvature", "fisher"), 2, "curvature"),
        (("--precision", "16"), 2, "precision"),
        (("--curvature", "gauss_newton", "--hvp", "finite_difference"), 2, "hvp='finite_difference'"),
        (("--foo", "1"), 2, "foo"),
    ],
)
def test_mistakes_about_a_spectrum(
    command: Command, trained: Trained, words: tuple[str, ...], status: int, said: str
) -> None:
    Path("text.ckpt").write_text("hello")
    torch.save(torch.ones(3), "tensor.ckpt")
    found, line = command.fails(*trained.words(*words, "--output", "spectrum.json"))
    assert found == status
    assert said in line
    assert not Path("spectrum.json").exists()


@pytest.mark.parametrize("name", ["fig1", "fig3", "fig4_recurrent"])
def test_the_papers_recipes_train(command: Command, name: str) -> None:
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
    status, _, err = command("fit", "-c", name, "--trainer.fast_dev_run=1", *quiet)
    assert status == 0, err


@pytest.mark.parametrize("name", ["fig4_autoencoder", "autoencoder_paper"])
def test_the_papers_autoencoder_trains_at_a_smaller_size(command: Command, name: str) -> None:
    small = ("--model.sizes=[100,30,15]", "--data.image_size=10", "--trainer.accelerator=cpu")
    status, _, err = command("fit", "-c", name, "--trainer.fast_dev_run=1", *small)
    assert status == 0, err


def test_without_a_command_all_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("fit", "validate", "test", "predict", "spectrum", "reproduce"))


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-sfn {cli.__version__}\n"
