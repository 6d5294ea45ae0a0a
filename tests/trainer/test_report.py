"""The report adds up over phases, and says honestly whether SFN paid."""

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_sfn import HessianSpectrum
from lightning_sfn.newton.spectrum import Spectrum
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.ledger import Ledger
from lightning_sfn.trainer.report import Phase, SwitchReport

from .modules import Fitting, NewtonCall, Scripted, forced, make_trainer, regression_data, regression_loader, sgd


def spectrum(low: float, high: float) -> Spectrum:
    values = torch.tensor([low, high], dtype=torch.float64)
    return Spectrum(values, torch.zeros(2, dtype=torch.float64), loss=1.0, gradient_norm=0.125, products=2)


def report(after: float = 0.5, last_speed: float = 0.01, sign: int = -1) -> SwitchReport:
    phases = [
        Phase("SGD", False, before=4.5, after=2.5, seconds=10.0, steps=40, gradients=80),
        Phase(
            "SaddleFreeNewton", True, before=2.5, after=1.5, seconds=4.0, steps=7, taken=6, gradients=90, products=91
        ),
        Phase("SGD", False, before=1.5, after=1.25, seconds=2.0, steps=8, gradients=16),
        Phase(
            "SaddleFreeNewton", True, before=1.25, after=after, seconds=1.0, steps=3, taken=3, gradients=30, products=9
        ),
    ]
    return SwitchReport("val_loss", sign, phases, last_speed=last_speed, checks=5)


def test_sums_over_the_phases_of_each_optimizer() -> None:
    made = report()
    assert (made.first_optimizer, made.plateau, made.final) == ("SGD", 2.5, 0.5)
    assert (made.first_steps, made.first_seconds) == (48, 12.0)
    assert (made.newton_steps, made.accepted_steps, made.newton_seconds, made.products) == (10, 9, 5.0, 100)
    assert made.speed(newton=True) == pytest.approx((1.0 + 0.75) / 5.0)
    assert made.speed(newton=False) == pytest.approx((2.0 + 0.25) / 12.0)
    metrics = made.metrics()
    assert metrics["sfn/improvement_per_second"] == pytest.approx(0.35)
    assert metrics["sfn/batch_gradients"] == 120
    assert metrics["sfn/first_batch_gradients"] == 96
    assert metrics["sfn/paid"] == 1.0


@pytest.mark.parametrize(
    ("made", "paid", "text"),
    [
        (report(), True, "SFN paid: it improved val_loss by 1.75, 0.35 per second; SGD had last made 0.01"),
        (report(last_speed=-3.0), True, "SFN paid"),
        (report(last_speed=0.5), False, "SFN did not pay: it improved val_loss by 1.75, 0.35 per second; SGD had last"),
        (report(after=2.5), False, "SFN did not pay: val_loss did not improve with it"),
        (report(sign=1), False, "SFN did not pay: val_loss did not improve"),  # accuracy that fell
        (report(after=math.nan), True, "improved val_loss by 1,"),  # a phase in which the metric was not seen
    ],
)
def test_verdict(made: SwitchReport, paid: bool, text: str) -> None:
    assert made.paid == paid
    assert text in made.verdict()
    assert made.verdict() in made.table()


def slower_than_ever(last_speed: float = 0.0275, sign: int = -1, **after: float) -> SwitchReport:
    """SFN makes 1.087 in 100 seconds; at the last rate of SGD it would be 2.75, of 1.287 that there were."""
    phases = [
        Phase("SGD", False, before=2.3, after=1.287, seconds=10.0, steps=40),
        Phase("SaddleFreeNewton", True, before=1.287, after=1.287 + sign * 1.087, seconds=100.0, steps=3, taken=3),
        *(Phase("SaddleFreeNewton", True, before=before, after=before) for before in after.values()),
    ]
    return SwitchReport("train_loss", sign, phases, last_speed=last_speed, checks=1, lowest=0.0)


def test_a_rate_that_leads_below_zero_is_not_compared_with() -> None:
    made = slower_than_ever()
    assert made.verdict() == (
        "SFN improved train_loss by 1.087, 0.0109 per second; SGD had last made 0.0275 per second (last check), a rate "
        "that cannot have lasted (it leads below zero within SFN's 100 seconds), so the two cannot be compared by it."
    )
    assert "sfn/paid" not in made.metrics()


def was_negative(made: SwitchReport) -> SwitchReport:
    made.lowest = -0.001
    return made


@pytest.mark.parametrize(
    "made",
    [
        slower_than_ever(last_speed=0.01287),  # just to zero
        slower_than_ever(sign=1),  # a metric that is to rise
        was_negative(slower_than_ever()),
        slower_than_ever(again=2.8),  # not below zero from where SFN began again
        slower_than_ever(unknown=math.nan),
    ],
)
def test_a_rate_that_may_have_lasted_is_compared_with(made: SwitchReport) -> None:
    assert made.verdict().startswith("SFN did not pay: it improved train_loss by 1.087, 0.0109 per second; SGD had")
    assert made.metrics()["sfn/paid"] == 0.0


def test_no_improvement_does_not_pay_whatever_the_rate() -> None:
    made = slower_than_ever()
    made.phases[-1].after = 1.3
    assert made.verdict() == "SFN did not pay: train_loss did not improve with it."
    assert made.metrics()["sfn/paid"] == 0.0


def test_the_lowest_value_that_any_check_saw_is_known() -> None:
    callback = forced(monitor="metric", check_finite=False)
    make_trainer(4, callbacks=[callback]).fit(Scripted([3.0, 2.5, -0.5, math.nan]), regression_loader())
    assert callback.report is not None
    assert callback.report.lowest == -0.5


def test_a_value_that_no_check_saw_is_known_at_the_end() -> None:
    ledger, trainer = Ledger("metric", -1, 1), make_trainer(1)
    ledger.start(trainer, "SGD")
    trainer.callback_metrics["metric"] = torch.tensor(-0.5)
    ledger.close(trainer)
    assert ledger.report.lowest == -0.5


def newton_phase(before: float, after: float, steps: int, taken: int) -> SwitchReport:
    phases = [
        Phase("SGD", False, before=4.5, after=2.5, seconds=10.0, steps=40, gradients=80),
        Phase("SaddleFreeNewton", True, before=before, after=after, seconds=4.0, steps=steps, taken=taken),
    ]
    return SwitchReport("val_loss", -1, phases)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (newton_phase(2.5, 2.25, 3, 0), "SFN took no step: of 3 tried, none lowered the loss."),
        (newton_phase(2.5, 2.25, 0, 0), "SFN took no step."),
        (newton_phase(math.nan, math.nan, 3, 3), "Whether SFN paid is not known: val_loss was not seen both"),
        (newton_phase(2.5, math.nan, 3, 3), "Whether SFN paid is not known: val_loss was not seen both"),
        (newton_phase(2.5, 2.25, 3, 1), "SFN improved val_loss by 0.25, 0.0625 per second; there is nothing"),
    ],
)
def test_what_sfn_did_not_do_or_nobody_knows_is_no_verdict(made: SwitchReport, said: str) -> None:
    assert made.verdict().startswith(said)


def test_a_metric_that_was_not_seen_since_the_first_step_tells_nothing() -> None:
    made = newton_phase(2.5, 2.5, 1, 1)
    made.phases[-1].unseen = True
    assert made.verdict().startswith("Whether SFN paid is not known")


def test_a_metric_that_moved_while_sfn_took_no_step_is_no_gain() -> None:
    made = newton_phase(2.5, 2.25, 3, 0)
    assert not made.paid
    assert made.speed(newton=True) == 0.0
    assert made.rows()[1][-1] == "0"


def test_table_is_aligned_and_holds_every_cell() -> None:
    made = report()
    lines = made.table().splitlines()
    assert set(lines[1]) == {"-"}
    assert {len(line) for line in lines[:6]} == {len(lines[0])}
    for line, row in zip(lines[2:6], made.rows(), strict=True):
        assert all(cell in line for cell in row)
    assert "curvature" not in made.table()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(108632056.0, "1.08632e+08"), (1e-9, "1e-09"), (2.302585, "2.30259"), (0.0, "0"), (math.nan, "-")],
)
def test_metrics_of_any_size_are_shown_in_six_digits(value: float, shown: str) -> None:
    made = report()
    made.phases[0].before = value
    assert made.rows()[0][5] == shown
    assert len({len(line) for line in made.table().splitlines()[:6]}) == 1


@pytest.mark.parametrize(
    ("estimated_from", "has_penalty", "said"),
    [
        ("", False, "last Newton step: loss 0.75 to 0.5 on its batches (val_loss may be older)"),
        (
            "its trial batches",
            True,
            "last Newton step: loss and weight decay 0.75 to about 0.5, by its trial batches (val_loss may be older)",
        ),
    ],
)
def test_the_last_step_is_told_as_it_was_measured(estimated_from: str, has_penalty: bool, said: str) -> None:
    made = report()
    made.last_step, made.estimated_from, made.has_penalty = (0.75, 0.5), estimated_from, has_penalty
    assert said in made.table().splitlines()


ONE_INNER = {"secant_steps": 0, "inner_steps": 1}
FACTORED = {"preconditioner": "kronecker"}


@pytest.mark.parametrize(
    ("newton", "share", "steps", "estimated_from"),
    [
        (ONE_INNER, 1.0, 2, ""),
        (ONE_INNER, 0.25, 2, "its trial batches"),
        (FACTORED, 0.25, 1, ""),  # quasi-Newton steps evaluate all batches
        (FACTORED | {"heavy_ball": 0.9}, 1.0, 2, "the slope"),  # the second step is one of momentum
        ({"lr": 0.0}, 0.25, 2, ""),  # no step is taken
    ],
)
def test_where_the_loss_after_the_last_step_comes_from(
    newton: dict[str, Any], share: float, steps: int, estimated_from: str
) -> None:
    torch.manual_seed(0)
    module, data = Fitting(torch.nn.Linear(3, 1), sgd(weight_decay=0.1)), regression_data(32)
    callback = forced(newton=newton, trial_fraction=share, curvature_fraction=0.25)
    make_trainer(2 + steps, callbacks=[callback]).fit(module, DataLoader(data, batch_size=2))
    made = callback.report
    assert made is not None
    assert made.last_step is not None
    assert (made.estimated_from, made.has_penalty) == (estimated_from, True)
    x, y = data.tensors
    with torch.no_grad():
        penalty = sum(0.05 * p.square().sum() for p in module.parameters())
        exact = float((module.net(x) - y).square().mean() + penalty)
    assert (made.last_step[1] == pytest.approx(exact, rel=1e-5)) == (estimated_from == "")


@pytest.mark.parametrize(
    ("secant_gradients", "estimated_from"), [(0, "its trial batches"), (1, "its trial batches"), (2, "")]
)
def test_a_gradient_that_refutes_the_step_is_no_measure_of_it(secant_gradients: int, estimated_from: str) -> None:
    """The first gradient after a subspace tells whether quasi-Newton steps follow, the second that one did."""
    record = StepRecord(2.0, 1.0, gradient_norm=0.5, accepted=True, secant_gradients=secant_gradients)
    assert counted(record).estimated_from == estimated_from


def counted(record: StepRecord, max_grad_norm: float | None = None) -> SwitchReport:
    ledger = Ledger("metric", -1, 1)
    ledger.report.phases.append(Phase("SaddleFreeNewton", True))
    driver = SimpleNamespace(batch_gradients=1, whole_trials=False, has_penalty=False)
    newton: Any = SimpleNamespace(driver=driver, newton=SimpleNamespace(max_grad_norm=max_grad_norm))
    ledger.count_step(make_trainer(1), record, newton)
    return ledger.report


@pytest.mark.parametrize(("limit", "clipped"), [(None, 0), (0.5, 0), (0.49, 1)])
def test_a_gradient_as_long_as_the_bound_is_not_clipped(limit: float | None, clipped: int) -> None:
    assert counted(StepRecord(2.0, 1.0, gradient_norm=0.5), limit).phases[0].clipped == clipped


def test_without_weight_decay_there_is_no_penalty() -> None:
    callback = forced()
    make_trainer(3, callbacks=[callback]).fit(Fitting(), regression_loader())
    assert callback.report is not None
    assert not callback.report.has_penalty


@pytest.mark.parametrize("bound", ["none", "tiny", "between", "huge"])
def test_steps_whose_gradient_was_clipped_are_counted(bound: str) -> None:
    norms = sorted(clipped_run(None)[1])
    limit = {"none": None, "tiny": norms[0] / 1e3, "between": 0.9 * norms[-1], "huge": 2 * norms[-1]}[bound]
    made, norms = clipped_run(limit)
    clipped = sum(limit is not None and norm > limit for norm in norms)
    assert clipped in {"none": [0], "tiny": [4], "between": [1, 2, 3], "huge": [0]}[bound]
    said = f"gradient clipped in {clipped} of 4 Newton steps (max_grad_norm)"
    assert [line for line in made.table().splitlines() if "clipped" in line] == [said] * (clipped > 0)


def clipped_run(limit: float | None) -> tuple[SwitchReport, list[float]]:
    torch.manual_seed(0)
    calls: list[NewtonCall] = []
    callback = forced(calls)
    make_trainer(6, callbacks=[callback], gradient_clip_val=limit).fit(Fitting(), regression_loader())
    assert callback.report is not None
    return callback.report, [float(call.gradient.norm()) for call in calls]


def test_spectra_are_shown_when_both_are_known() -> None:
    made = report()
    made.spectrum_at_switch = spectrum(-3.0, 10.0)
    assert "curvature" not in made.table()
    made.spectrum_at_end = spectrum(-0.5, 20.0)
    assert "curvature at the switch: from -3 to 10 (ratio -0.3), gradient norm 0.125" in made.table()
    assert "curvature at the end: from -0.5 to 20" in made.table()


def test_a_report_survives_a_checkpoint() -> None:
    made = report()
    made.spectrum_at_switch = spectrum(-3.0, 10.0)
    made.last_step, made.estimated_from, made.has_penalty, made.lowest = (0.75, 0.5), "the slope", True, -1.0
    torch.save(made.state_dict(), "report.pt")
    restored = SwitchReport.from_state(torch.load("report.pt", weights_only=True))
    assert restored.phases == made.phases
    assert restored.table() == made.table()
    assert restored.lowest == -1.0
    assert restored.spectrum_at_end is None
    assert restored.spectrum_at_switch is not None
    assert restored.spectrum_at_switch.to_dict() == made.spectrum_at_switch.to_dict()


@pytest.mark.parametrize("place", [0, 2])
def test_report_and_verdict_are_shown_wherever_the_progress_bar_stands(
    place: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    callbacks: list[Any] = [HessianSpectrum(log=False), forced()]
    callbacks.insert(place, TQDMProgressBar())
    with caplog.at_level(logging.INFO):
        make_trainer(3, callbacks=callbacks, enable_progress_bar=True).fit(Fitting(), regression_loader())
    shown = capsys.readouterr().out + caplog.text
    assert shown.count("Hv products") == 1
    assert shown.count("HessianSpectrum at step 12") == 1
