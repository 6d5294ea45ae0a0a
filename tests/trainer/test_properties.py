"""Random modules under random Trainers and policies: no crash, no changed log, no lost parameter."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_lightning import seed_everything
from torch import Tensor, nn

from lightning_sfn import SaddleFreeNewton, SwitchToSFN

from .modules import Fitting, MemoryLogger, bits, make_trainer, random_streams, regression_loader

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(4, 4),
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "batch norm": lambda: nn.BatchNorm1d(4),
    "layer norm": lambda: nn.LayerNorm(4),
    "dropout": lambda: nn.Dropout(0.3),
}

NETS = st.lists(st.sampled_from(sorted(LAYERS)), max_size=4)

TRAINERS = st.fixed_dictionaries(
    {
        "accumulate_grad_batches": st.integers(1, 3),
        "gradient_clip_val": st.sampled_from([None, 0.1]),
        "precision": st.sampled_from(["32-true", "64-true", "bf16-mixed"]),
        "limit_train_batches": st.sampled_from([1.0, 2]),
    }
)

POLICIES = st.fixed_dictionaries(
    {
        "gradient_batches": st.sampled_from(["epoch", 1, 2, 3]),
        "curvature_fraction": st.sampled_from([0.1, 1.0]),
        "trial_fraction": st.sampled_from([0.1, 1.0]),
        "adaptive": st.booleans(),
        "hold": st.booleans(),
        "return_when": st.sampled_from([None, 1, 3, "slower_per_second", "slower_per_epoch"]),
        "momentum": st.sampled_from(["keep", "reset"]),
        "schedulers": st.sampled_from(["rest", "step"]),
        "cooldown": st.integers(0, 1),
        "min_delta_mode": st.sampled_from(["abs", "rel"]),
        "require_negative_curvature": st.booleans(),
        "probe_dim": st.sampled_from([0, 2]),
    }
)

NEWTONS = st.fixed_dictionaries(
    {
        "krylov_dim": st.integers(1, 4),
        "inner_steps": st.integers(1, 2),
        "damping": st.sampled_from(["warm", "grid", "levenberg_marquardt", 0.1]),
        "previous_directions": st.integers(0, 2),
        "preconditioner": st.sampled_from([None, "diagonal"]),
        "hvp": st.sampled_from(["auto", "retain", "recompute", "finite_difference"]),
    }
)


class Built(Fitting):
    """A network of some layers; its rate of zero leaves every change of a parameter to SFN."""

    def __init__(self, layers: list[str], rate: float) -> None:
        net = nn.Sequential(nn.Linear(3, 4), *(LAYERS[name]() for name in layers), nn.Linear(4, 1))
        super().__init__(net)
        self.rate = rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1].to(batch[0]))
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def fit(layers: list[str], flags: dict[str, Any], callback: SwitchToSFN | None, rate: float) -> tuple[Any, ...]:
    seed_everything(0)
    module, logger = Built(layers, rate), MemoryLogger()
    trainer = make_trainer(6, callbacks=[callback] if callback else [], logger=logger, **flags)
    trainer.fit(module, regression_loader(14, 4, shuffle=True))
    rows = [(step, row) for step, row in logger.rows if not any(name.startswith("sfn/") for name in row)]
    metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("sfn/")}
    return rows, bits(metrics), bits(module.state_dict()), random_streams(), trainer.global_step


def policy(options: dict[str, Any], newton: dict[str, Any]) -> SwitchToSFN:
    made = partial(SaddleFreeNewton, **newton)
    return SwitchToSFN(
        patience=1, min_delta=1e9 if options["min_delta_mode"] == "abs" else 1.0, optimizer=made, **options
    )


SOME = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@SOME
@given(layers=NETS, flags=TRAINERS, options=POLICIES, newton=NEWTONS)
def test_steps_of_length_zero_change_nothing_at_all(
    layers: list[str], flags: dict[str, Any], options: dict[str, Any], newton: dict[str, Any]
) -> None:
    """Logs, metrics, weights, buffers and random numbers are those of the run without the callback."""
    plain = fit(layers, flags, None, 0.0)
    callback = policy(options, newton | {"lr": 0.0})
    beside = fit(layers, flags, callback, 0.0)
    if not options["require_negative_curvature"]:
        assert callback.report is not None
        assert callback.report.newton_steps > 0
    for without, also in zip(plain, beside, strict=True):
        assert also == without


@SOME
@given(layers=NETS, flags=TRAINERS, options=POLICIES, newton=NEWTONS)
def test_every_policy_trains_and_loses_no_parameter(
    layers: list[str], flags: dict[str, Any], options: dict[str, Any], newton: dict[str, Any]
) -> None:
    callback = policy(options, newton)
    _, _, state, _, steps = fit(layers, flags, callback, 0.01)
    batches = 2 if flags["limit_train_batches"] == 2 else 4
    assert steps == 6 * -(-batches // flags["accumulate_grad_batches"])
    for name, value in Built(layers, 0.0).state_dict().items():
        assert name in state
        doubled = flags["precision"] == "64-true" and value.is_floating_point()
        found = torch.frombuffer(bytearray(state[name]), dtype=torch.float64 if doubled else value.dtype)
        assert found.numel() == value.numel()
        assert bool(torch.isfinite(found).all())
    if callback.report is not None:
        assert sum(phase.steps for phase in callback.report.phases if not phase.newton) <= steps
        assert callback.report.table()
