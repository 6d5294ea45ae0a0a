import torch

from lightning_sfn.newton.spectrum import Spectrum
from lightning_sfn.trainer.report import SwitchReport


def spectrum(low: float, high: float) -> Spectrum:
    values = torch.tensor([low, high], dtype=torch.float64)
    return Spectrum(values, torch.zeros(2, dtype=torch.float64), loss=1.0, gradient_norm=0.125, products=2)


def report() -> SwitchReport:
    made = SwitchReport("val_loss", "SGD", plateau=2.5, first_steps=40, first_seconds=1.25)
    made.final, made.newton_steps, made.accepted_steps, made.newton_seconds, made.products = 0.5, 7, 6, 3.0, 91
    return made


def test_rows_hold_the_numbers_before_and_after() -> None:
    rows = {name: (before, after) for name, before, after in report().rows()}
    assert rows["val_loss"] == ("2.5000", "0.5000")
    assert rows["optimizer"] == ("SGD", "SaddleFreeNewton")
    assert rows["steps"] == ("40", "7 (6 taken)")
    assert rows["seconds"][1] == "3.0"
    assert rows["Hessian-vector products"] == ("0", "91")
    assert "smallest eigenvalue" not in rows


def test_spectra_are_shown_when_both_are_known() -> None:
    made = report()
    made.spectrum_at_switch = spectrum(-3.0, 10.0)
    assert len(made.rows()) == 5
    made.spectrum_at_end = spectrum(-0.5, 20.0)
    rows = {name: (before, after) for name, before, after in made.rows()}
    assert rows["smallest eigenvalue"] == ("-3", "-0.5")
    assert rows["largest eigenvalue"] == ("10", "20")
    assert rows["gradient norm"] == ("0.125", "0.125")


def test_table_is_aligned_and_holds_every_cell() -> None:
    lines = report().table().splitlines()
    assert "until the switch" in lines[0]
    assert set(lines[1]) == {"-"}
    assert {len(line) for line in lines} == {len(lines[0])}
    for line, row in zip(lines[2:], report().rows(), strict=True):
        assert all(cell in line for cell in row)


def test_a_report_survives_a_checkpoint() -> None:
    spectrum = Spectrum(torch.tensor([-1.0, 2.0]), torch.tensor([0.1, 0.2]), 3.0, 0.5, 2)
    report = SwitchReport("loss", "SGD", 4.0, first_steps=7, products=5, spectrum_at_switch=spectrum)
    restored = SwitchReport.from_state(report.state_dict(newton_seconds=9.0))
    assert restored.rows()[:3] == report.rows()[:3]
    assert restored.newton_seconds == 9.0
    assert restored.spectrum_at_end is None
    assert restored.spectrum_at_switch is not None
    assert restored.spectrum_at_switch.to_dict() == spectrum.to_dict()
