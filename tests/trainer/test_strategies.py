"""The strategies on one device: names, options, what they refuse, and checkpoints."""

import logging
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sfn import SaddleFreeNewton, SFNDDPStrategy, SFNStrategy

from .modules import Factorised, MemoryLogger, factorised_loader, flat, forced, make_trainer, sgd

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "kind", "start"),
    [
        ("sfn", SFNStrategy, None),
        ("sfn_ddp", SFNDDPStrategy, "popen"),
        ("sfn_ddp_spawn", SFNDDPStrategy, "spawn"),
        ("sfn_ddp_fork", SFNDDPStrategy, "fork"),
    ],
)
def test_names(name: str, kind: type, start: str | None) -> None:
    strategy = StrategyRegistry.get(name)
    assert type(strategy) is kind
    assert getattr(strategy, "_start_method", None) == start


@pytest.mark.parametrize("first", ["lightning_sfn", "pytorch_lightning"])
def test_names_exist_whatever_is_imported_first(first: str) -> None:
    lines = [
        f"import {first}, sys, lightning_sfn",
        f"assert ('torch' in sys.modules) == {first == 'pytorch_lightning'}",
        "from pytorch_lightning.strategies import StrategyRegistry as r",
        "assert {'sfn', 'sfn_ddp', 'sfn_ddp_spawn', 'sfn_ddp_fork'} <= set(r.available_strategies())",
        "assert 'lightning_sfn.trainer.strategies' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], cwd=ROOT, check=True)


def test_a_name_misspelt_is_told_by_lightning() -> None:
    with pytest.raises(ValueError, match="invalid strategy name: `strategy='sfn_dpp'`"):
        make_trainer(strategy="sfn_dpp")


def test_one_device_is_one_device() -> None:
    with pytest.raises(MisconfigurationException, match=r"the Trainer has 2: use strategy='sfn_ddp'\.$"):
        make_trainer(strategy="sfn", devices=2)


def test_newton_trains_from_the_first_step_and_is_logged() -> None:
    module, logger = Factorised(), MemoryLogger()
    trainer = make_trainer(8, strategy="sfn", logger=logger)
    trainer.fit(module, factorised_loader())
    assert isinstance(trainer.optimizers[0], SaddleFreeNewton)
    assert len(logger.values("sfn/loss_after")) == 8
    assert trainer.callback_metrics["train_loss"] < 1.0
    assert trainer.callbacks == make_trainer(1).callbacks  # it leaves nothing behind
    assert "training_step" not in trainer.strategy.__dict__ or callable(trainer.strategy.training_step)


def test_it_is_what_the_callback_does_after_its_switch() -> None:
    """From the same weights, on the same batches."""

    class Start(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                nn.utils.vector_to_parameters(flat(Factorised(size=4)), pl_module.parameters())

    switched, direct = Factorised(), Factorised()
    make_trainer(5, callbacks=[forced(), Start()]).fit(switched, factorised_loader(shuffle=False))
    make_trainer(3, strategy="sfn").fit(direct, factorised_loader(shuffle=False))
    assert torch.equal(flat(switched), flat(direct))


def test_options_reach_the_optimizer_and_its_windows() -> None:
    strategy = SFNStrategy(partial(SaddleFreeNewton, krylov_dim=3, basis="sharded"), gradient_batches=2)
    logger = MemoryLogger()
    trainer = make_trainer(1, strategy=strategy, logger=logger, gradient_clip_val=0.5)
    trainer.fit(Factorised(), factorised_loader())
    assert len(logger.values("sfn/products")) == 4
    assert trainer.optimizers[0].krylov_dim == 3
    assert trainer.optimizers[0].max_grad_norm == 0.5


@pytest.mark.parametrize("strategy", ["sfn", "auto"])
def test_clipping_by_value_is_said_to_have_no_effect(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [forced(switch_at_epoch=1)] if strategy == "auto" else []
    options: dict[str, Any] = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
    trainer = make_trainer(2, strategy=strategy, callbacks=callbacks, **options)
    with caplog.at_level(logging.INFO):
        trainer.fit(Factorised(), factorised_loader())
    assert trainer.optimizers[0].max_grad_norm is None
    who = "SFNStrategy" if strategy == "sfn" else "SwitchToSFN"
    said = f"{who}: clipping by value does not apply to Newton steps; max_grad_norm would."
    assert caplog.text.count(said) == 1


def test_a_newton_optimizer_of_the_module_is_kept_with_its_schedulers() -> None:
    class Own(Factorised):
        def configure_optimizers(self) -> Any:
            optimizer = SaddleFreeNewton(self.parameters(), krylov_dim=5)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    trainer = make_trainer(2, strategy="sfn")
    trainer.fit(Own(), factorised_loader())
    assert trainer.optimizers[0].krylov_dim == 5
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


class Saving(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(f"{trainer.current_epoch}.ckpt")


def test_resuming_is_going_on() -> None:
    through, resumed = Factorised(), Factorised()
    trainer = make_trainer(4, strategy="sfn", callbacks=[Saving()])
    trainer.fit(through, factorised_loader(shuffle=False))
    make_trainer(4, strategy="sfn").fit(resumed, factorised_loader(shuffle=False), ckpt_path="1.ckpt")
    assert torch.equal(flat(through), flat(resumed))
    trainer.save_checkpoint("by_hand.ckpt")
    assert "window" in torch.load("by_hand.ckpt")["optimizer_states"][0]


def test_a_trainer_without_the_strategy_goes_on_with_the_modules_own_optimizer() -> None:
    make_trainer(1, strategy="sfn", callbacks=[Saving()]).fit(Factorised(lr=0.03), factorised_loader())
    plain = make_trainer(2)
    plain.fit(Factorised(lr=0.03), factorised_loader(), ckpt_path="0.ckpt")
    assert plain.optimizers[0].param_groups[0]["lr"] == 0.03
    again = make_trainer(2, strategy="sfn")
    again.fit(Factorised(lr=0.03), factorised_loader(), ckpt_path="0.ckpt")
    assert again.optimizers[0].param_groups[0]["lr"] == 1.0


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    make_trainer(1, callbacks=[Saving()]).fit(Factorised(), factorised_loader())
    with pytest.raises(MisconfigurationException, match=r"^The checkpoint was saved with another optimizer"):
        make_trainer(2, strategy="sfn").fit(Factorised(), factorised_loader(), ckpt_path="0.ckpt")


class Manual(Factorised):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Several(Factorised):
    def configure_optimizers(self) -> Any:
        return [sgd()([self.a]), sgd()([self.b])]


class Synchronised(Factorised):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.SyncBatchNorm(3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, r"^SFNStrategy needs automatic optimization"),
        (Several, r"^Training with multiple optimizers is only supported with manual"),
        (Synchronised, r"^SFNStrategy cannot differentiate twice through synchronised batch norm"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused(module: type, message: str) -> None:
    trainer = make_trainer(1, strategy="sfn")
    with pytest.raises((MisconfigurationException, RuntimeError), match=message):
        trainer.fit(module(), factorised_loader())


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"^reduction is 'sum', but 'mean' or 'samples' is expected\.$"):
        SFNStrategy(reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"^gradient_batches is 0"):
        SFNDDPStrategy(gradient_batches=0)


def test_hooks_of_communication_are_refused() -> None:
    strategy = SFNDDPStrategy(ddp_comm_hook=lambda state, bucket: None, timeout=timedelta(seconds=30))
    trainer = make_trainer(1, strategy="sfn")
    trainer.strategy.__dict__["_ddp_comm_hook"] = strategy._ddp_comm_hook
    with pytest.raises(MisconfigurationException, match=r"a ddp_comm_hook puts something else in its place"):
        trainer.fit(Factorised(), factorised_loader())


def test_class_path_in_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    for name in ("SFNStrategy", "SFNDDPStrategy"):
        text = f"{{class_path: lightning_sfn.{name}, init_args: {{gradient_batches: 3, reduction: samples}}}}"
        made = parser.instantiate_classes(parser.parse_args([f"--trainer.strategy={text}"])).trainer.strategy
        assert type(made).__name__ == name
        assert (made._budgets.gradient_batches, made._budgets.reduction) == (3, "samples")


def test_the_switch_beside_the_strategy_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="nothing to switch to"):
        make_trainer(1, strategy="sfn", callbacks=[forced()]).fit(Factorised(), factorised_loader())


def test_a_curvature_that_replays_cannot_give_is_refused_at_once() -> None:
    class Fisher(Factorised):
        def configure_optimizers(self) -> Any:
            return SaddleFreeNewton(self.parameters(), curvature="fisher")

    module = Fisher()
    with pytest.raises(MisconfigurationException, match="needs more than training_step hands over"):
        make_trainer(1, strategy="sfn").fit(module, factorised_loader())
