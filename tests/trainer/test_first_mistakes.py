"""What a first user gets wrong ends in a sentence that says what to write instead."""

from typing import Any

import lightning.pytorch as other
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sfn import (
    HessianSpectrum,
    SaddleFreeNewton,
    SaddleFreeNewtonMixin,
    SFNDDPStrategy,
    SFNStrategy,
    SwitchToSFN,
    hessian_spectrum,
)
from lightning_sfn.newton import ObjectiveError


class Regression(LightningModule):
    def __init__(self, make: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.net, self.make = nn.Linear(3, 1), make

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def fit(module: LightningModule, *callbacks: Any, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=list(callbacks), enable_model_summary=False, **(quiet | {"max_epochs": 2} | options))
    trainer.fit(module, DataLoader(torch.randn(12, 3), batch_size=4))  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("kind", [SwitchToSFN, SFNStrategy, SFNDDPStrategy])
def test_an_option_of_the_optimizer_is_sent_there(kind: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"optimizer=functools.partial\(SaddleFreeNewton, krylov_dim=3"):
        kind(krylov_dim=3)


def test_a_spectrum_takes_no_options_of_steps() -> None:
    with pytest.raises(MisconfigurationException, match=r"HessianSpectrum was given damping='grid'.*SwitchToSFN"):
        HessianSpectrum(damping="grid")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="nonsense"):
        HessianSpectrum(nonsense=1)  # type: ignore[call-arg]


def test_the_optimizer_of_an_ordinary_module_names_the_ways_to_use_it() -> None:
    with pytest.raises(ObjectiveError, match="needs SwitchToSFN, strategy='sfn' or SaddleFreeNewtonMixin"):
        fit(Regression(SaddleFreeNewton))


def test_two_switches_are_one_too_many() -> None:
    with pytest.raises(MisconfigurationException, match=r"2 SwitchToSFN callbacks \(monitors train_loss, val\)"):
        fit(Regression(), SwitchToSFN(), SwitchToSFN("val"))


@pytest.mark.parametrize("patience", [0, "5", 2.5])
def test_patience_is_a_number_of_checks(patience: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"^patience is {patience!r}, but a positive number of checks"):
        SwitchToSFN(patience=patience)


def test_a_loss_in_place_of_its_function_is_refused() -> None:
    net = nn.Linear(3, 1)
    loss = net(torch.ones(2, 3)).square().mean()
    with pytest.raises(
        ObjectiveError, match=r"^The loss was given as a Tensor, but a function .* expected, .*lambda: "
    ):
        SaddleFreeNewton(net.parameters()).step(loss)  # type: ignore[arg-type]
    with pytest.raises(ObjectiveError, match=r"^The loss was given as a Tensor"):
        hessian_spectrum(loss, net.parameters())  # type: ignore[arg-type]


def test_a_module_in_place_of_its_parameters_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(
        ValueError, match=r"^The parameters were given as a module \(Sequential\).*model\.parameters\(\)"
    ):
        hessian_spectrum(lambda: net(torch.ones(2, 3)).square().mean(), net)


def test_a_training_step_in_place_of_an_objective_is_refused() -> None:
    class Old(SaddleFreeNewtonMixin, Regression):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
            return self.net(batch).square().mean()

    with pytest.raises(
        MisconfigurationException, match=r"^Old defines no objective\(batch\).*: rename its training_step"
    ):
        fit(Old(make=SaddleFreeNewton))


def test_a_switch_before_the_first_epoch_reports_no_nan(caplog: pytest.LogCaptureFixture) -> None:
    switch = SwitchToSFN(switch_at_epoch=0, probe_dim=0)
    with caplog.at_level("INFO"):
        fit(Regression(), switch)
    assert switch.report is not None
    (before, after), (start, _) = (row[5:7] for row in switch.report.rows())
    assert (before, after) == ("-", start)  # no step was taken before the first epoch's metric was complete
    assert "nan" not in switch.report.table() + caplog.text
    assert "train_loss is not known yet" in caplog.text


def test_the_report_knows_what_the_last_step_did() -> None:
    switch = SwitchToSFN(switch_at_epoch=0, probe_dim=0)
    trainer = fit(Regression(), switch)
    assert switch.report is not None
    assert switch.report.last_step is not None
    before, after = switch.report.last_step
    assert before == pytest.approx(float(trainer.callback_metrics["train_loss"]), rel=1e-5)  # logged before the step
    assert after < before
    assert f"{after:.6g} on its batches" in switch.report.table()


def test_a_spectrum_of_parameters_that_the_loss_does_not_know_is_refused() -> None:
    x, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(ObjectiveError, match="depends on none of the parameters"):
        hessian_spectrum(lambda: x.square().sum(), [unused])
    flat = hessian_spectrum(lambda: (0 * x**2).sum(), [x])
    assert not flat.eigenvalues.any()


def test_the_spectrum_behind_the_verdict_is_in_the_history() -> None:
    spectra = HessianSpectrum(every_n_epochs=2, log=False)
    trainer = fit(Regression(), spectra, max_epochs=3)
    assert [step for step, _ in spectra.history] == [6, 9]
    assert trainer.global_step == 9
    assert f"{spectra.history[-1][1].lambda_max:.3g}" in spectra.verdict


def test_the_other_namespace_is_refused_in_one_sentence() -> None:
    with pytest.raises(TypeError, match=r"but this one is lightning\.pytorch's"):
        other.Trainer(strategy="sfn", logger=False, accelerator="cpu")
    with pytest.raises(MisconfigurationException, match="the mixin belongs to pytorch_lightning"):

        class Mixed(SaddleFreeNewtonMixin, other.LightningModule):
            pass
