"""What an isolation puts back; whole runs with replays are in test_replay.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from lightning_sfn import HessianSpectrum
from lightning_sfn.trainer.isolation import Isolation, isolated, rounds_otherwise

from .modules import Fitting, Untidy, make_trainer, random_streams, regression_loader


def test_nested_isolation_and_shared_submodules() -> None:
    module = Untidy()
    module.again = module.norm  # one module under two names
    before = module.traces()
    buffers = list(module.buffers())
    trainer = make_trainer(1)
    with isolated(trainer, module):
        with isolated(trainer, module):
            module(torch.randn(4, 3))
            module.count = 7
        assert module.count == 0
        assert module.norm.num_batches_tracked is not None
        assert module.norm.num_batches_tracked.item() == 0
        module(torch.randn(4, 3))
    assert module.traces() == before
    assert all(a is b for a, b in zip(module.buffers(), buffers, strict=True))


def test_rewinding_gives_each_evaluation_the_same_start() -> None:
    """One isolation for several evaluations: none sees what another did, tensors shared by two names included."""
    module, trainer = Untidy(dropout=0.0), make_trainer(1)
    module.plain = module.alias = torch.zeros(2)
    before, streams = module.traces(), random_streams()
    seen = []
    with Isolation(trainer, module) as isolation:
        for _ in range(3):
            isolation.rewind()
            seen.append(
                (module.count, len(module.losses), float(module.norm.running_mean.sum()), module.plain.tolist())
            )
            module.count += 1
            module.losses.append(torch.ones(()))
            module.brand_new = 1
            module(torch.randn(4, 3))
            module.plain.add_(1.0)
            assert module.alias is module.plain
            trainer.should_stop = True
    assert seen == [seen[0]] * 3
    assert module.traces() == before
    assert random_streams() == streams
    assert not trainer.should_stop
    assert module.plain is module.alias
    assert not module.plain.any()


def test_parameters_are_never_copied() -> None:
    """Neither registered ones, nor those that a module keeps in an attribute of its own."""
    module = Fitting()
    module.__dict__["favourite"] = module.net[0].weight
    module.net[2].weight.requires_grad_(False)
    with Isolation(make_trainer(1), module) as isolation:
        isolation.rewind()
        assert module.favourite is module.net[0].weight
        assert module.net[2].weight is dict(module.named_parameters())["net.2.weight"]
        (gradient,) = torch.autograd.grad(module.favourite.sum(), module.net[0].weight)
    assert bool(gradient.all())


# ------------------------------------------------------------------------------------------------ cuDNN

CUDNN = torch.backends.cudnn


@pytest.fixture(autouse=True)
def cudnn_as_it_was() -> Iterator[None]:
    yield
    CUDNN.enabled, CUDNN.deterministic, CUDNN.benchmark = True, False, False
    if hasattr(CUDNN, "conv"):
        CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "tf32"
    CUDNN.allow_tf32 = True


def flags() -> tuple[bool, ...]:
    return CUDNN.enabled, CUDNN.allow_tf32, CUDNN.deterministic, CUDNN.benchmark


@pytest.mark.parametrize(
    ("layer", "enabled"),
    [
        (lambda: nn.Conv2d(1, 1, 3), True),
        (lambda: nn.BatchNorm1d(3), True),
        (lambda: nn.LSTMCell(3, 2), True),  # not by cuDNN
        (lambda: nn.GRU(3, 2), False),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.Sequential(nn.LSTM(3, 2))), False),
        (lambda: nn.CTCLoss(), False),
    ],
)
def test_cudnn_is_left_to_layers_that_it_can_differentiate_twice(layer: Any, enabled: bool) -> None:
    """In float32 whatever training allows; what the user chose besides stays, and everything comes back."""
    CUDNN.deterministic = CUDNN.benchmark = True
    before = flags()
    with isolated(make_trainer(1), Fitting(layer())):
        assert flags() == (enabled, False, True, True)
        with isolated(make_trainer(1), Fitting()):
            assert flags() == (enabled, False, True, True)
        assert flags() == (enabled, False, True, True)
    assert flags() == before == (True, True, True, True)
    CUDNN.enabled = CUDNN.allow_tf32 = False
    with isolated(make_trainer(1), Fitting(layer())):
        assert flags() == (False, False, True, True)
    assert flags() == (False, False, True, True)


@pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="this torch has no precision for each operation")
def test_precisions_chosen_for_each_operation_are_kept() -> None:
    CUDNN.conv.fp32_precision = "ieee"  # now torch refuses to say whether TF32 is allowed
    with isolated(make_trainer(1), Fitting(nn.LSTM(3, 2))):
        assert not CUDNN.enabled
        assert (CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) == ("ieee", "tf32")
    assert CUDNN.enabled


class OnCuda(Fitting):
    """Says that it is on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


CONVOLUTION = nn.Sequential(nn.Conv1d(3, 2, 1), nn.Flatten(), nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("module", "enabled", "tf32", "precision", "otherwise"),
    [
        (OnCuda(CONVOLUTION), True, True, "32-true", True),
        (OnCuda(nn.GRU(3, 2)), True, True, "32-true", True),
        (OnCuda(CONVOLUTION), True, False, "32-true", False),
        (OnCuda(CONVOLUTION), False, True, "32-true", False),
        (OnCuda(nn.Linear(3, 1)), True, True, "32-true", False),
        (OnCuda(nn.Conv1d(3, 2, 1).double()), True, True, "64-true", False),
        (Fitting(CONVOLUTION), True, True, "32-true", False),
        (Fitting(nn.Linear(3, 1)), True, True, "bf16-mixed", True),
    ],
)
def test_where_losses_of_training_are_rounded_in_another_way(
    module: Fitting, enabled: bool, tf32: bool, precision: Any, otherwise: bool
) -> None:
    CUDNN.enabled, CUDNN.allow_tf32 = enabled, tf32
    assert rounds_otherwise(make_trainer(1, precision=precision), module) == otherwise


@pytest.mark.parametrize(
    ("module", "asked", "otherwise"),
    [
        (Fitting(nn.Linear(3, 1)), "medium", True),
        (Fitting(nn.Linear(3, 1)), "high", False),
        (Fitting(nn.Linear(3, 1).double()), "medium", False),
        (OnCuda(nn.Linear(3, 1)), "medium", False),  # TF32 there, in replays too
    ],
)
def test_products_in_bfloat16_are_another_rounding(module: Fitting, asked: str, otherwise: bool) -> None:
    torch.set_float32_matmul_precision(asked)
    try:
        assert rounds_otherwise(make_trainer(1), module) == otherwise
    finally:
        torch.set_float32_matmul_precision("highest")


class LoggingPast(Fitting):
    """Logs past its attribute `log`, as the helper of a base class does."""

    def report(self, name: str, value: Any) -> None:
        super().log(name, value, on_step=True, on_epoch=True, batch_size=1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.report("helper", loss)
        LightningModule.log(self, "direct", loss, on_epoch=True, batch_size=1)
        LightningModule.log_dict(self, {"several": loss}, on_step=True, batch_size=1)
        return loss


class Rows(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.on_train_batch_end(trainer)


@pytest.mark.parametrize("options", [{"every_n_steps": 2}, {"every_n_epochs": 1}])
def test_replays_do_not_log_past_the_attribute(options: dict[str, Any]) -> None:
    seen = []
    for callbacks in ([], [HessianSpectrum(log=False, strict=True, **options)]):
        torch.manual_seed(0)
        rows = Rows()
        make_trainer(2, callbacks=[*callbacks, rows]).fit(LoggingPast(), regression_loader())
        seen.append(rows.rows)
    assert seen[0] == seen[1]
    assert {"helper_epoch", "direct_epoch", "several"} <= set(seen[1][-1])
