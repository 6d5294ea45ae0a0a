"""The probe is one and the same for a whole run: over epochs, after a resume, and on several processes."""

import enum
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sfn import HessianSpectrum
from lightning_sfn.newton.spectrum import Spectrum
from lightning_sfn.trainer.probe import Probe, ProbeBatches

from .modules import Fitting, MemoryLogger, flat, make_trainer, regression_data, regression_loader, sgd, small_net

SIZE = sum(p.numel() for p in small_net().parameters())


def looking(**options: Any) -> HessianSpectrum:
    return HessianSpectrum(**({"krylov_dim": SIZE, "precision": 64, "log": False} | options))


def loss_on(module: LightningModule, rows: Any) -> float:
    """The mean squared error on some rows, in float64."""
    x, y = (t[rows].double() for t in regression_data().tensors)
    net = small_net().double()
    torch.nn.utils.vector_to_parameters(flat(module).double(), net.parameters())
    with torch.no_grad():
        return F.mse_loss(net(x), y).item()


def fit(callback: HessianSpectrum, epochs: int, loader: Any = None, module: Any = None, ckpt_path: Any = None) -> Any:
    torch.manual_seed(0)
    trainer = make_trainer(epochs, callbacks=[callback])
    trainer.fit(module or Fitting(), loader or regression_loader(), ckpt_path=ckpt_path)
    return trainer


# ------------------------------------------------------------------------------------------------ which batches


@pytest.mark.parametrize(
    ("num_batches", "every", "steps"),
    [
        (1, 1, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 1, [3, 4, 5, 6, 7, 8]),
        (3, 2, [4, 6, 8]),
        (4, 3, [6, 8]),  # and at the end of the run
        (9, 1, [5, 6, 7, 8]),
    ],
)
def test_no_spectrum_before_all_batches_are_there(num_batches: int, every: int, steps: list[int]) -> None:
    """The epoch has four; a probe of nine makes do with those."""
    spectrum = looking(every_n_steps=every, num_batches=num_batches)
    module = Fitting(optimizer=sgd(0.0))
    fit(spectrum, 2, module=module)
    assert [step for step, _ in spectrum.history] == steps
    expected = loss_on(module, slice(4 * min(num_batches, 4)))
    assert [s.loss for _, s in spectrum.history] == pytest.approx([expected] * len(steps), rel=1e-12)


def test_the_probe_is_fixed_though_the_loader_shuffles() -> None:
    spectrum = looking(num_batches=2)
    fit(spectrum, 4, regression_loader(shuffle=True), Fitting(optimizer=sgd(0.0)))
    first, *others = [s.eigenvalues for _, s in spectrum.history]
    assert len(others) == 3
    assert all(torch.equal(first, values) for values in others)


def test_uneven_batches_weigh_as_many_cases_as_they_have() -> None:
    spectrum, module = looking(num_batches=3), Fitting()
    fit(spectrum, 1, DataLoader(regression_data(11), batch_size=5), module)  # 5, 5 and 1
    x, y = (t.double() for t in regression_data(11).tensors)
    net = small_net().double()
    torch.nn.utils.vector_to_parameters(flat(module).double(), net.parameters())
    assert spectrum.last is not None
    assert spectrum.last.loss == pytest.approx(F.mse_loss(net(x), y).item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------ resume


def same(left: list[tuple[int, Spectrum]], right: list[tuple[int, Spectrum]]) -> bool:
    return [step for step, _ in left] == [step for step, _ in right] and all(
        a.to_dict() == b.to_dict() for (_, a), (_, b) in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("options", [{}, {"num_batches": 3, "density": True}, {"every_n_steps": 4, "num_batches": 2}])
def test_a_resumed_run_has_the_spectra_of_an_uninterrupted_one(options: dict[str, Any]) -> None:
    whole, first, second = (looking(**options) for _ in range(3))
    expected = fit(whole, 4)
    fit(first, 2).save_checkpoint("half.ckpt")
    resumed = fit(second, 4, ckpt_path="half.ckpt")
    assert torch.equal(flat(resumed.lightning_module), flat(expected.lightning_module))
    assert len(whole.history) >= 4
    assert same(second.history, whole.history)
    assert second.verdict == whole.verdict


@pytest.mark.parametrize(("first", "second", "kept"), [(1, 3, 1), (3, 1, 3), (9, 9, 4), (2, 2, 2)])
def test_another_number_of_batches_after_a_resume_is_told(
    first: int, second: int, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    fit(looking(num_batches=first), 1).save_checkpoint("one.ckpt")
    spectrum = looking(num_batches=second)
    with caplog.at_level(logging.INFO):
        fit(spectrum, 2, ckpt_path="one.ckpt").save_checkpoint("two.ckpt")
    assert spectrum._batches.total == kept
    said = f"num_batches is {second} and was {first}; the run goes on with the {kept} probe batch(es) of the checkpoint"
    assert (said in caplog.text) == (first != second)
    assert spectrum.state_dict()["num_batches"] == first


def test_the_checkpoint_holds_the_batches_as_plain_data() -> None:
    spectrum = looking(num_batches=2)
    fit(spectrum, 1).save_checkpoint("a.ckpt")
    state = torch.load("a.ckpt", weights_only=True)["callbacks"][HessianSpectrum().state_key]
    assert len(state["batches"]) == 2
    for number, ((x, y), index) in enumerate(state["batches"]):
        rows = slice(4 * number, 4 * number + 4)
        assert index == number
        assert torch.equal(x, regression_data().tensors[0][rows])
        assert torch.equal(y, regression_data().tensors[1][rows])
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()  # not a window into all of the data
    ((step, entries),) = state["history"]
    assert step == 4
    assert Spectrum.from_dict(entries).to_dict() == spectrum.history[0][1].to_dict()


@pytest.mark.parametrize("save_batches", [True, False])
def test_after_a_resume_the_saved_batches_decide_or_the_next_ones(save_batches: bool) -> None:
    still = Fitting(optimizer=sgd(0.0))
    fit(looking(save_batches=save_batches), 1, module=still).save_checkpoint("a.ckpt")
    spectrum, other = looking(save_batches=save_batches), DataLoader(regression_data(8, seed=5), batch_size=8)
    fit(spectrum, 2, other, Fitting(optimizer=sgd(0.0)), "a.ckpt")
    (_, before), (_, after) = spectrum.history
    assert torch.equal(before.eigenvalues, after.eigenvalues) == save_batches
    assert (
        torch.load("a.ckpt", weights_only=True)["callbacks"][HessianSpectrum().state_key]["batches"] is None
    ) != save_batches


@dataclass
class Rows:
    """A batch of a type of its own."""

    x: Tensor
    y: Tensor


class Kind(enum.IntEnum):
    """An integer that is more than one."""

    ONE = 1


class Number(float):
    """Likewise."""


class Unwrapping(Fitting):
    """Takes such batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch = batch["rows"] if isinstance(batch, dict) else batch
        pair = [batch.x, batch.y] if isinstance(batch, Rows) else batch[:2]
        return super().training_step(pair, batch_idx)


def collated(extra: Any) -> Any:
    def collate(rows: list[Any]) -> Any:
        x, y = (torch.stack(column) for column in zip(*rows, strict=True))
        return extra(x, y)

    return collate


@pytest.mark.parametrize(
    ("batch", "kept"),
    [
        (lambda x, y: {"rows": [x, y], "name": "a", "weight": 0.5, "flag": True, "nothing": None}, True),
        (lambda x, y: [x, y, Kind.ONE], False),
        (lambda x, y: [x, y, Number(0.5)], False),
        (lambda x, y: {"rows": [x, y], Kind.ONE: 1}, False),
        (Rows, False),
    ],
)
def test_checkpoints_load_whatever_the_batches_are(batch: Any, kept: bool) -> None:
    """What a checkpoint could not be loaded with is left out of it, and the run goes on with other batches."""
    loader = regression_loader(collate_fn=collated(batch))
    spectrum = looking()
    fit(spectrum, 1, loader, Unwrapping()).save_checkpoint("a.ckpt")
    assert len(spectrum.history) == 1
    state = torch.load("a.ckpt", weights_only=True)["callbacks"][HessianSpectrum().state_key]
    assert (state["batches"] is not None) == kept
    again = looking()
    fit(again, 2, loader, Unwrapping(), "a.ckpt")
    assert [step for step, _ in again.history] == [4, 8]


def test_a_checkpoint_from_the_middle_of_the_first_epoch() -> None:
    """Its probe is not complete; the resumed run draws one."""
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[looking(num_batches=3, every_n_steps=1)],
    )
    trainer.fit(Fitting(), regression_loader())
    trainer.save_checkpoint("a.ckpt")
    spectrum = looking(num_batches=3)
    fit(spectrum, 2, ckpt_path="a.ckpt")
    assert spectrum.last is not None


# ------------------------------------------------------------------------------------------------ several processes


class Uneven(Fitting):
    """The second process has batches of another size."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [t[:1] for t in batch] if self.global_rank == 1 else batch


class Drawing(MemoryLogger):
    """Takes pictures, in whatever process."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.rows.append((step, {f"picture {key}": 1.0}))


class Counted(HessianSpectrum):
    """Counts what goes between the processes, and writes down what each of them has."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.reductions = 0
        original = torch.distributed.all_reduce

        def all_reduce(*args: Any, **kwargs: Any) -> Any:
            self.reductions += 1
            return original(*args, **kwargs)

        torch.distributed.all_reduce = all_reduce  # in this forked process alone

    def _take(self, trainer: Trainer, module: LightningModule, place: int) -> None:
        before = self.reductions
        super()._take(trainer, module, place)
        self.spent = self.reductions - before

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        assert isinstance(trainer.logger, Drawing)
        entries = [(step, spectrum.to_dict()) for step, spectrum in self.history]
        pictures = [name for _, row in trainer.logger.rows for name in row if name.startswith("picture")]
        kept = {"history": entries, "verdict": self.verdict, "spent": self.spent, "pictures": pictures}
        kept |= {"state": self.state_dict()["batches"], "own": len(self._batches), "parameters": flat(pl_module)}
        torch.save(kept, f"rank{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_share_one_probe() -> None:
    """Four batches of 4 and 1 cases: the spectrum is that of their ten cases together, on both."""
    callback = Counted(krylov_dim=12, tol=None, num_batches=4, precision=64)
    trainer = make_trainer(2, devices=2, strategy="ddp_fork", callbacks=[callback], logger=Drawing())
    trainer.fit(Uneven(optimizer=sgd(0.1)), regression_loader())
    first, second = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["history"] == second["history"]
    assert first["verdict"] == second["verdict"] != ""
    assert first["own"] == second["own"] == 2
    assert len(first["state"]) == len(second["state"]) == 4
    assert sorted(set(first["pictures"])) == ["picture hessian/index_against_loss", "picture hessian/ritz_values"]
    assert second["pictures"] == []
    (_, _), (step, entries) = first["history"]
    assert step == 4
    products = entries["products"]
    assert products == 12
    assert products <= first["spent"] == second["spent"] <= products + 5  # beside those: cases, loss and gradient

    batches = [arguments[0] for arguments in first["state"]]
    assert [len(x) for x, _ in batches] == [4, 4, 1, 1]
    together = [[torch.cat(column) for column in zip(*batches, strict=True)]]
    rows = regression_data().tensors[0].tolist()
    assert len({rows.index(x) for x in together[0][0].tolist()}) == 10
    module = Fitting(optimizer=sgd(0.0))
    torch.nn.utils.vector_to_parameters(first["parameters"], module.parameters())
    alone = HessianSpectrum(krylov_dim=12, tol=None, precision=64, log=False, batches=together)
    make_trainer(1, callbacks=[alone]).fit(module, regression_loader())
    assert alone.last is not None
    assert entries["loss"] == pytest.approx(alone.last.loss, rel=1e-12)
    assert entries["gradient_norm"] == pytest.approx(alone.last.gradient_norm, rel=1e-9)
    assert entries["eigenvalues"] == pytest.approx(alone.last.eigenvalues.tolist(), rel=1e-7, abs=1e-10)


def test_fewer_batches_than_processes_are_refused() -> None:
    class Two:
        world_size = 2

    with pytest.raises(Exception, match=r"The probe has 1 batches, but each of the 2 processes needs at least one"):
        ProbeBatches(1).share_out(Two(), [(torch.ones(1), 0)])  # type: ignore[arg-type]


def test_the_newton_trial_leaves_the_parameters_alone() -> None:
    class Trying(HessianSpectrum):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before, originals = flat(pl_module), [id(p) for p in pl_module.parameters()]
            assert self.last is not None
            probe: Probe = self._probe
            words, trial = probe.verdict(trainer, pl_module, self._batches, self.last)
            assert trial is not None
            assert trial.measured > 0
            assert f"lowers the loss by {trial.measured:.3g}" in words
            assert torch.equal(flat(pl_module), before)
            assert [id(p) for p in pl_module.parameters()] == originals
            self.tried = True

    for precision in (32, 64):
        callback = Trying(krylov_dim=8, log=False, precision=precision)
        fit(callback, 1)
        assert callback.tried
