"""`InspectingTrainer.spectrum`: what `HessianSpectrum` sees at the same parameters and batches, from a checkpoint."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sfn import HessianSpectrum, Spectrum
from lightning_sfn.trainer.inspection import InspectingTrainer

from .modules import (
    Fitting,
    MemoryLogger,
    bits,
    flat,
    forced,
    make_trainer,
    random_streams,
    regression_data,
    regression_loader,
    small_net,
)

SIZE = sum(p.numel() for p in small_net().parameters())
OPTIONS: dict[str, Any] = {"krylov_dim": 16, "num_batches": 3, "tol": 1e-6, "precision": 64}


def inspecting(**options: Any) -> InspectingTrainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1, "log_every_n_steps": 1}
    return InspectingTrainer(**(quiet | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HessianSpectrum]:
    """Two epochs, with the spectrum at their end, and the checkpoint."""
    torch.manual_seed(0)
    callback = HessianSpectrum(every_n_epochs=2, smallest=5, largest=5, density=True, log=False, **OPTIONS)
    trainer = make_trainer(2, callbacks=[callback])
    trainer.fit(Fitting(), regression_loader())
    path = tmp_path_factory.mktemp("trained") / "last.ckpt"
    trainer.save_checkpoint(path)
    trainer.save_checkpoint(path.with_name("weights.ckpt"), weights_only=True)
    return path, callback


@pytest.mark.parametrize("name", ["last.ckpt", "weights.ckpt"])
@pytest.mark.parametrize("max_epochs", [2, -1])
def test_the_numbers_are_those_of_the_callback(
    trained: tuple[Path, HessianSpectrum], name: str, max_epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint was written at the end of two epochs, which are all that the Trainer would train."""
    path, callback = trained
    module, trainer = Fitting(), inspecting(max_epochs=max_epochs)
    before = random_streams()
    loader = regression_loader()
    spectrum = trainer.spectrum(module, loader, ckpt_path=str(path.with_name(name)), density=True, **OPTIONS)
    assert spectrum is not None
    assert callback.last is not None
    # Not to the last bit: rounding depends on where tensors lie in memory.
    torch.testing.assert_close(spectrum.to_dict(), callback.last.to_dict(), rtol=1e-9, atol=1e-9)
    assert trainer.verdict == callback.verdict != ""
    assert spectrum.converged
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert bits(module.state_dict()) == bits(saved)
    assert all(p.grad is None for p in module.parameters())
    assert trainer.global_step == 0
    assert before[2:] == random_streams()[2:]  # only the loader draws a seed, from torch's generator
    assert "Hessian-vector products (at most)" in capsys.readouterr().err


def test_without_a_checkpoint_the_module_is_looked_at_as_it_is() -> None:
    module = Fitting(nn.Sequential(small_net(), nn.BatchNorm1d(1, affine=False)))
    before = bits(module.state_dict())
    spectrum = inspecting().spectrum(module, regression_loader(), krylov_dim=SIZE, num_batches=1)
    assert spectrum is not None
    assert len(spectrum.eigenvalues) == SIZE
    assert bits(module.state_dict()) == before


class Rows(LightningDataModule):
    """The same rows from a data module."""

    def train_dataloader(self) -> Any:
        return regression_loader()


def test_a_data_module_and_files(trained: tuple[Path, HessianSpectrum], empty_folder: Path) -> None:
    path, _ = trained
    options = OPTIONS | {"ckpt_path": str(path), "output": "deep/spectrum.json", "plot": "deep/spectrum.png"}
    spectrum = inspecting().spectrum(Fitting(), datamodule=Rows(), **options)
    assert spectrum is not None
    assert Spectrum.load("deep/spectrum.json").to_dict() == spectrum.to_dict()
    assert Path("deep/spectrum.png").read_bytes().startswith(b"\x89PNG")
    kept = Path("deep/spectrum.json").read_bytes()
    with pytest.raises(MisconfigurationException, match=r"deep/spectrum\.json exists: choose another name"):
        inspecting().spectrum(Fitting(), datamodule=Rows(), **options)
    assert Path("deep/spectrum.json").read_bytes() == kept
    inspecting().spectrum(Fitting(), datamodule=Rows(), **(options | {"overwrite": True, "krylov_dim": 8}))
    assert len(Spectrum.load("deep/spectrum.json").eigenvalues) == 8
    assert sorted(p.name for p in empty_folder.rglob("*")) == ["deep", "spectrum.json", "spectrum.png"]


def test_fewer_batches_than_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"krylov_dim": 4, "num_batches": 100, "output": "few.json"}
    with caplog.at_level(logging.INFO, "pytorch_lightning.utilities.rank_zero"):
        few = inspecting().spectrum(Fitting(small_net()), regression_loader(), **options)
    assert few is not None
    assert few.products >= 4
    assert json.loads(Path("few.json").read_text())["num_batches"] == 4
    assert "num_batches is 100, but the data loader gives 4: the spectrum is of those." in caplog.text


class OneCycle(Fitting):
    """Its schedule needs to know how long training will be."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(steps))]


def test_schedules_find_the_length_of_training() -> None:
    assert inspecting(max_epochs=3).spectrum(OneCycle(), regression_loader(), krylov_dim=4) is not None


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_steps": 0}, {"max_epochs": 5, "min_epochs": 3}])
def test_however_long_training_is_to_be_there_is_none(options: dict[str, Any]) -> None:
    module = Fitting()
    before = flat(module)
    assert inspecting(**options).spectrum(module, regression_loader(), krylov_dim=4) is not None
    assert torch.equal(flat(module), before)


def test_the_trainer_trains_before_and_after_as_it_was_built() -> None:
    """Looking in between changes nothing: callbacks, loggers and the length of training are its own."""
    runs = []
    for looks in (False, True):
        torch.manual_seed(0)
        module, logger, timer = Fitting(), MemoryLogger(), Timer()
        trainer = inspecting(max_epochs=2, logger=logger, callbacks=[timer])
        trainer.fit(module, regression_loader())
        if looks:
            assert trainer.spectrum(module, regression_loader(), krylov_dim=4) is not None
        assert trainer.current_epoch == 2
        assert timer in trainer.callbacks
        assert trainer.loggers == [logger]
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, regression_loader())
        runs.append((flat(module).tolist(), logger.rows, trainer.global_step, trainer.current_epoch))
    assert runs[0] == runs[1]
    assert runs[0][2:] == (12, 3)


def test_a_checkpoint_of_a_switched_run() -> None:
    module, trainer = Fitting(), make_trainer(4, callbacks=[forced()])
    trainer.fit(module, regression_loader())
    trainer.save_checkpoint("switched.ckpt")
    fresh = Fitting()
    spectrum = inspecting().spectrum(fresh, regression_loader(), ckpt_path="switched.ckpt", krylov_dim=4)
    assert spectrum is not None
    assert torch.equal(flat(fresh), flat(module))


class Nothing(IterableDataset[Any]):
    """Does not know that it is empty."""

    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.filterwarnings("ignore:Total length of .* is zero:UserWarning")
@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (lambda: DataLoader(regression_data(0)), {}),
        (lambda: DataLoader(Nothing()), {}),
        (regression_loader, {"limit_train_batches": 0}),
    ],
)
def test_an_empty_loader(loader: Any, options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="The training data loader is empty"):
        inspecting(**options).spectrum(Fitting(), loader(), output="spectrum.json", krylov_dim=4)
    assert not Path("spectrum.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_batches": 0}, "num_batches is 0"),
        ({"krylov_dim": 0}, "krylov_dim is 0"),
        ({"tol": -1.0}, "tol is -1.0"),
        ({"max_products": 3}, "max_products is 3"),
        ({"density": True, "density_probes": 0}, "density_probes is 0"),
        ({"precision": 16}, "precision is 16"),
        ({"curvature": "fisher"}, "curvature='fisher', which needs more"),
        ({"plot": "spectrum.xyz"}, "plot is spectrum.xyz, but a name that ends in .png, .pdf, .svg is expected"),
    ],
)
def test_bad_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException) as info:
        inspecting().spectrum(Fitting(), regression_loader(), **options)
    assert said in str(info.value)
    assert str(info.value).endswith(".")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sfn.trainer.inspection.find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r'pip install "lightning-sfn\[plot\]"'):
        inspecting().spectrum(Fitting(), regression_loader(), plot="spectrum.png", output="spectrum.json")
    assert not Path("spectrum.json").exists()


def broken(kind: str, good: Path) -> str:
    """A file that is no checkpoint of `Fitting`."""
    path = Path(f"{kind}.ckpt")
    if kind == "text":
        path.write_text("hello\n" * 100)
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "half":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "tensor":
        torch.save(torch.ones(3), path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "dictionary":
        torch.save({"weight": torch.ones(3)}, path)
    elif kind == "state":
        torch.save({"state_dict": [1.0]}, path)
    elif kind == "folder":
        path.mkdir()
    return str(path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "There is no checkpoint missing.ckpt"),
        ("text", "is not a checkpoint that Lightning wrote"),
        ("nothing", "is not a checkpoint that Lightning wrote"),
        ("half", "is not a checkpoint that Lightning wrote"),
        ("tensor", "is not a checkpoint that Lightning wrote"),
        ("list", "is not a checkpoint that Lightning wrote"),
        ("dictionary", "is not a checkpoint that Lightning wrote"),
        ("state", "is not a checkpoint that Lightning wrote"),
        ("folder", "is not a checkpoint that Lightning wrote"),
    ],
)
def test_what_is_no_checkpoint_is_refused(trained: tuple[Path, HessianSpectrum], kind: str, said: str) -> None:
    module = Fitting()
    before = flat(module)
    with pytest.raises(MisconfigurationException) as info:
        inspecting().spectrum(module, regression_loader(), ckpt_path=broken(kind, trained[0]), krylov_dim=4)
    assert said in str(info.value)
    assert "\n" not in str(info.value)
    assert torch.equal(flat(module), before)


@pytest.mark.parametrize("net", [lambda: small_net(hidden=5), lambda: nn.Linear(3, 1)])
def test_a_checkpoint_of_another_model(trained: tuple[Path, HessianSpectrum], net: Any) -> None:
    with pytest.raises(MisconfigurationException) as info:
        inspecting().spectrum(Fitting(net()), regression_loader(), ckpt_path=str(trained[0]))
    assert "does not fit Fitting: build the model with the options that it was trained with" in str(info.value)
    assert "\n" not in str(info.value)


class Manual(Fitting):
    """Optimizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_modules_that_cannot_be_looked_at() -> None:
    with pytest.raises(MisconfigurationException, match="A spectrum needs automatic optimization"):
        inspecting().spectrum(Manual(), regression_loader())
    frozen = Fitting(small_net().requires_grad_(False))
    with pytest.raises((MisconfigurationException, ValueError), match=r"nothing to optimize|empty parameter list"):
        inspecting().spectrum(frozen, regression_loader())


def test_a_spectrum_is_no_reason_to_be_another_trainer() -> None:
    assert issubclass(InspectingTrainer, Trainer)
    module, twin = (Fitting() for _ in range(2))
    twin.load_state_dict(module.state_dict())
    inspecting().fit(module, regression_loader())
    make_trainer(1).fit(twin, regression_loader())
    assert torch.equal(flat(module), flat(twin))
