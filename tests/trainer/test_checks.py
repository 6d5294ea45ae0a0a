"""Options of another type than expected are refused where they are given, in one sentence that names them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn import HessianSpectrum, SaddleFreeNewton, SaddleFreeNewtonMixin, SFNStrategy, SwitchToSFN
from lightning_sfn.trainer.inspection import InspectingTrainer
from lightning_sfn.trainer.rules import SwitchRules

from .modules import Fitting, make_trainer, regression_loader

NAN = float("nan")


class Mixed(SaddleFreeNewtonMixin, LightningModule):
    pass


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        make()
    message = str(caught.value)
    assert "expected" in message
    assert message.endswith(".")
    assert "\n" not in message
    return message


WRONG: dict[Any, dict[str, list[Any]]] = {
    SwitchToSFN: {
        "monitor": [None, 5, ""],
        "patience": [True, 2.0, None, "3"],
        "min_delta": ["1e-3", None, NAN, True],
        "min_delta_mode": [None, ["abs"]],
        "cooldown": [None, 1.5],
        "check_every_n_steps": [2.5, "5", True],
        "min_epochs": [None, 0.5],
        "min_steps": [None, "7"],
        "switch_at_epoch": ["5", 1.5],
        "switch_at_step": [2.5],
        "return_when": [2.0, ["slower_per_second"]],
        "min_predicted_decrease": [None, NAN],
        "momentum": [None, [1]],
        "schedulers": [None],
        "probe_dim": [None, 2.5],
        "gradient_batches": [True, 2.0, None],
        "curvature_fraction": [None, "0.1", True],
        "trial_fraction": [[0.1], NAN],
        "reduction": [None],
        "optimizer": ["sgd", None],
    },
    HessianSpectrum: {
        "every_n_epochs": [1.5, "1", True],
        "every_n_steps": [2.5],
        "num_batches": [None, 2.5, "epoch", True],
        "krylov_dim": [None, "32", 2.5],
        "smallest": [None, 1.5],
        "density_probes": [None],
        "groups": [["a.*"], "net.*", {"a": 3}, {"a": None}, {"a": [1]}],
        "batches": [5, "batch"],
        "pictures_every": [None, 0.5],
        "precision": ["64", [32]],
    },
    SFNStrategy: {"optimizer": ["sgd", None], "gradient_batches": [1.5], "curvature_fraction": [None]},
    Mixed: {"max_grad_norm": ["x"], "max_step_norm": [True], "scheduler_monitor": [3], "trial_fraction": ["1"]},
    partial(InspectingTrainer(logger=False, enable_checkpointing=False).spectrum, Fitting()): {
        "num_batches": [None, 2.5],
        "density_probes": [None],
        "precision": ["64"],
    },
}


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [(owner, name, value) for owner, options in WRONG.items() for name, values in options.items() for value in values],
)
def test_values_of_the_wrong_type(owner: Any, name: str, value: Any) -> None:
    assert refusal(lambda: owner(**{name: value})).startswith(f"{name} is ")


def test_values_of_the_right_type_are_taken() -> None:
    rules = SwitchRules(min_epochs=2, switch_at_epoch=None, return_when=3, min_predicted_decrease=1)
    assert (rules.min_epochs, rules.return_when) == (2, 3)
    assert HessianSpectrum(groups={"a": "x.*", "b": ("y", "z")}).groups == {"a": ["x.*"], "b": ["y", "z"]}
    assert HessianSpectrum(batches=torch.zeros(2, 3)).groups == {}


@pytest.mark.parametrize("options", [{"foo": 1}, {"krylov_dim": 2.5}])
@pytest.mark.parametrize("strategy", [False, True])
def test_a_factory_that_cannot_make_the_optimizer_is_refused_before_training(
    strategy: bool, options: dict[str, Any]
) -> None:
    make: Any = partial(SaddleFreeNewton, **options)
    given: dict[str, Any] = (
        {"strategy": SFNStrategy(make)} if strategy else {"callbacks": [SwitchToSFN(optimizer=make)]}
    )
    name = next(iter(options))
    with pytest.raises(MisconfigurationException, match=rf"^S\w+ cannot make its optimizer: .*{name}.*[^.]\.$"):
        make_trainer(1, **given).fit(Fitting(), regression_loader())
