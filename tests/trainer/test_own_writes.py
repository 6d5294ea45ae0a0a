"""Parameters that a step changes itself: put back after a replay, or refused before training."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sfn import HessianSpectrum, SaddleFreeNewton, SaddleFreeNewtonMixin
from lightning_sfn.trainer.isolation import Isolation, isolated
from lightning_sfn.trainer.own_writes import ParameterCopies, noting_writes

from .modules import Fitting, bits, forced, make_trainer, regression_loader, small_net


def follow(teacher: nn.Module, student: nn.Module) -> None:
    """As most write it."""
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.mul_(0.9).add_(s, alpha=0.1)


def follow_by_data(teacher: nn.Module, student: nn.Module) -> None:
    """Past the version counter of the teacher."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data.mul_(0.9).add_(s.data, alpha=0.1)


def follow_elsewhere(teacher: nn.Module, student: nn.Module) -> None:
    """In other memory."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data = 0.9 * t.data + 0.1 * s.data


class MeanTeacher(Fitting):
    """Fits with a teacher that follows the network in each step.

    Args:
        update: How the teacher follows.
        every: It follows in every n-th batch.
        registered: Whether the teacher is a submodule.
        frozen: Whether the teacher's parameters require no gradient; no optimizer trains them in either case.
    """

    def __init__(
        self, update: Callable[..., None] = follow, every: int = 1, registered: bool = True, frozen: bool = True
    ) -> None:
        torch.manual_seed(0)
        super().__init__(small_net())
        teacher = copy.deepcopy(self.net).requires_grad_(not frozen)
        with torch.no_grad():
            teacher[0].weight.mul_(2)
        self.teacher: Any = teacher if registered else [teacher]
        self.update, self.every = update, every

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        teacher = self.teacher[0] if isinstance(self.teacher, list) else self.teacher
        if batch_idx % self.every == self.every - 1:
            self.update(teacher, self.net)
        with torch.no_grad():
            target = teacher(batch[0])
        return super().training_step(batch, batch_idx) + 0.5 * F.mse_loss(self.net(batch[0] + 0.1), target)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05)

    def state(self) -> dict[str, Any]:
        teacher = self.teacher[0] if isinstance(self.teacher, list) else self.teacher
        return bits({**self.state_dict(), **{f"teacher {k}": v for k, v in teacher.state_dict().items()}})


TEACHERS: dict[str, dict[str, Any]] = {
    "in place": {},
    "by data": {"update": follow_by_data},
    "elsewhere": {"update": follow_elsewhere},
    "now and then": {"every": 2},
    "in a list": {"registered": False},
    "not frozen": {"frozen": False},
}


def after(module: MeanTeacher, *callbacks: Callback) -> dict[str, Any]:
    make_trainer(2, callbacks=list(callbacks)).fit(module, regression_loader())
    return module.state()


@pytest.mark.parametrize("options", TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_that_follows_in_the_step_does_not_notice_replays(options: dict[str, Any]) -> None:
    alone = after(MeanTeacher(**options))
    spectrum = HessianSpectrum(log=False, krylov_dim=4, num_batches=2, strict=True)
    assert after(MeanTeacher(**options), spectrum) == alone
    assert after(MeanTeacher(**options), forced(patience=99)) == alone  # the rehearsal alone


class Following(Callback):
    """Checks that a teacher moves only with Lightning's own steps."""

    def __init__(self) -> None:
        self.updates = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.expected = copy.deepcopy(pl_module)
        self.expected.update(*self.pair(self.expected))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        teacher, _ = self.pair(pl_module)
        moved = batch_idx % pl_module.every == pl_module.every - 1
        self.updates += moved
        if moved:
            assert bits(teacher.state_dict()) == bits(self.pair(self.expected)[0].state_dict())

    @staticmethod
    def pair(module: Any) -> tuple[nn.Module, nn.Module]:
        return (module.teacher[0] if isinstance(module.teacher, list) else module.teacher), module.net


@pytest.mark.parametrize("options", TEACHERS.values(), ids=TEACHERS)
def test_newton_steps_leave_a_teacher_to_lightnings_own_steps(options: dict[str, Any]) -> None:
    switch, following = forced(switch_at_epoch=1), Following()
    module = MeanTeacher(**options)
    make_trainer(3, callbacks=[following, switch]).fit(module, regression_loader())
    assert switch.report is not None
    assert switch.report.newton_steps == 2
    assert following.updates == 12 // module.every


def test_only_what_a_step_changes_is_copied_after_the_first_evaluation() -> None:
    module, trainer = MeanTeacher(), make_trainer(1)
    module.backbone = nn.Linear(3, 3).requires_grad_(False)
    trainer.strategy.optimizers = [module.configure_optimizers()]
    for _ in range(2):
        with isolated(trainer, module):
            follow(module.teacher, module.net)
    with Isolation(trainer, module) as isolation:
        assert {kept.name for kept in isolation._untrained._kept} == {
            name for name, _ in module.named_parameters() if name.startswith("teacher")
        }


def test_a_first_change_in_a_later_replay_ends_in_a_sentence() -> None:
    module, trainer = MeanTeacher(), make_trainer(1)
    with isolated(trainer, module):
        pass
    sentence = r"changed 'teacher.0.weight'.* in place, .* no evaluation before .*: change it in on_train_batch_end, or"
    with pytest.raises(MisconfigurationException, match=sentence), isolated(trainer, module):
        follow(module.teacher, module.net)
    before = bits(module.state_dict())
    with isolated(trainer, module):  # from then on there are copies
        follow(module.teacher, module.net)
    assert bits(module.state_dict()) == before


def test_a_change_that_lightnings_own_step_makes_is_put_back_in_replays() -> None:
    module, trainer = MeanTeacher(), make_trainer(1)
    trainer.strategy.connect(module)
    with isolated(trainer, module):
        pass
    with noting_writes(trainer):
        follow(module.teacher, module.net)
    before = bits(module.state_dict())
    with isolated(trainer, module):
        follow(module.teacher, module.net)
    assert bits(module.state_dict()) == before


def test_parameters_get_their_bits_back() -> None:
    """A sign of zero and a NaN included."""
    module = Fitting()
    weight = module.net[0].weight
    with torch.no_grad():
        weight[0, :2] = torch.tensor([0.0, float("nan")])
    before, place = bits(module.state_dict()), weight.data_ptr()
    with ParameterCopies(module) as copies:
        assert not copies.restore()
        weight.data[0, 0] = -0.0
        assert copies.restore() == ["net.0.weight"]
        weight.data = torch.ones_like(weight)
    assert bits(module.state_dict()) == before
    assert weight.data_ptr() == place


# ------------------------------------------------------------------------------------------------ trained ones


class Normalising(Fitting):
    """Normalises the weight that it trains in place, from some epoch on."""

    def __init__(self, first_epoch: int = 0) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.prototypes, self.first_epoch = nn.Linear(3, 1, bias=False), first_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch >= self.first_epoch:
            with torch.no_grad():
                self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        return super().training_step(batch, batch_idx) + F.mse_loss(self.prototypes(batch[0]), batch[1])


class Renormalising(Fitting):
    """Has an embedding that shortens its rows whenever it is evaluated."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Embedding(6, 3, max_norm=0.3), nn.Flatten(), nn.Linear(6, 1)))


class RenormalisingNewton(SaddleFreeNewtonMixin, Renormalising):
    """The same with manual optimization."""

    def objective(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return SaddleFreeNewton(self.parameters())


def tokens() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randint(0, 6, (16, 2), generator=generator), torch.randn(16, 1, generator=generator))
    return DataLoader(data, batch_size=4)


@pytest.mark.parametrize(
    ("make", "loader"),
    [(Normalising, regression_loader), (Renormalising, tokens)],
    ids=["normalised weight", "max_norm"],
)
@pytest.mark.parametrize("precision", [32, 64])
def test_a_spectrum_leaves_weights_that_a_step_normalises_as_they_were(
    make: Any, loader: Callable[[], Any], precision: Any
) -> None:
    states = []
    spectrum = HessianSpectrum(log=False, krylov_dim=4, every_n_steps=1, precision=precision, strict=True)
    for callbacks in ([], [spectrum]):
        module = make()
        make_trainer(2, callbacks=callbacks).fit(module, loader())
        states.append(bits(module.state_dict()))
    assert states[1] == states[0]
    assert len(spectrum.history) == 8


@pytest.mark.parametrize("switched", [False, True])
def test_a_step_that_normalises_a_trained_weight_is_refused(switched: bool) -> None:
    """On the first batch, or where it begins to."""
    sentence = (
        r"^(SwitchToSFN|A Newton step) needs a training_step that leaves the parameters alone that are being trained, "
        r"but that of Normalising changes 'prototypes.weight' in place: .* on_train_batch_end\.$"
    )
    trainer = make_trainer(4, callbacks=[forced(switch_at_epoch=1)])
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer.fit(Normalising(first_epoch=2 * switched), regression_loader())
    assert trainer.current_epoch == 2 * switched


@pytest.mark.parametrize(
    ("make", "callback", "strategy"),
    [(Renormalising, True, "auto"), (Renormalising, False, "sfn"), (RenormalisingNewton, False, "auto")],
    ids=["callback", "strategy", "mixin"],
)
def test_a_layer_with_max_norm_is_refused_before_training(make: Any, callback: bool, strategy: str) -> None:
    trainer = make_trainer(1, callbacks=[forced()] if callback else [], strategy=strategy)
    sentence = r"needs a training_step .*, but layer 'net.0' changes its weight in place \(max_norm=0.3\): leave"
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer.fit(make(), tokens())
    assert trainer.global_step == 0


def test_a_frozen_layer_with_max_norm_is_put_back() -> None:
    states = []
    for callbacks in ([], [HessianSpectrum(log=False, krylov_dim=4, strict=True)], [forced(patience=99)]):
        module = Renormalising()
        module.net[0].requires_grad_(False)
        make_trainer(1, callbacks=callbacks, limit_train_batches=1).fit(module, tokens())
        states.append(bits(module.state_dict()))
    assert states[1] == states[0]
    assert states[2] == states[0]
