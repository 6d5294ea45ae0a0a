"""What each ingredient of a Newton step sees of the data, and that it is weighted as the data are."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sfn import SaddleFreeNewton, SwitchToSFN
from lightning_sfn.trainer.budgets import DataBudgets

from .modules import (
    Fitting,
    NewtonCall,
    Noting,
    flat,
    forced,
    make_trainer,
    regression_data,
    regression_loader,
    sgd,
    small_net,
)

# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("value", [0, -1, 1.5, "batch", None])
def test_gradient_batches_out_of_range(value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"^gradient_batches is .*positive number or 'epoch'"):
        DataBudgets(gradient_batches=value)


@pytest.mark.parametrize("name", ["curvature_fraction", "trial_fraction"])
@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_fractions_out_of_range(name: str, share: float) -> None:
    with pytest.raises(MisconfigurationException, match=f"^{name} is .*share above 0 and up to 1"):
        DataBudgets(**{name: share})


@pytest.mark.parametrize("growth", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 31])
@pytest.mark.parametrize(("curvature", "trial"), [(0.1, 0.1), (0.5, 0.5), (0.3, 0.6), (1.0, 0.2)])
def test_choice_has_the_sizes_asked_for_and_overlaps_only_without_room(
    count: int, curvature: float, trial: float, growth: float
) -> None:
    chosen = DataBudgets("epoch", curvature, trial).choose(count, growth, torch.Generator().manual_seed(3))
    asked = (round(share * growth * count) for share in (curvature, trial))
    sizes = tuple(min(count, max(4, size)) for size in asked)  # at least four batches, where there are four
    assert tuple(map(len, chosen)) == sizes
    first, second = map(set, chosen)
    assert (len(first), len(second)) == sizes
    assert first | second <= set(range(count))
    assert len(first & second) == max(0, sum(sizes) - count)


def test_choice_follows_the_generator_alone() -> None:
    budgets = DataBudgets(20, 0.2, 0.2)

    def draw(seed: int) -> tuple[list[int], list[int]]:
        return budgets.choose(20, 1.0, torch.Generator().manual_seed(seed))

    first = draw(0)
    torch.rand(5)
    assert draw(0) == first
    assert len({str(draw(seed)) for seed in range(8)}) > 1


def test_largest_growth_makes_both_shares_the_whole_window() -> None:
    budgets = DataBudgets("epoch", 0.25, 0.1)
    both = budgets.choose(13, budgets.largest_growth, torch.Generator().manual_seed(0))
    assert both == (list(range(13)), list(range(13)))


# ------------------------------------------------------------------------------------------------ the window's gradient


def full_gradient(net: nn.Module, parameters: Tensor, cases: int, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Loss and gradient on the whole data set, without anything of ours."""
    x, y = (t.to(dtype) for t in regression_data(cases).tensors)
    values = dict(
        zip(dict(net.named_parameters()), parameters.split([p.numel() for p in net.parameters()]), strict=True)
    )
    shaped = {name: values[name].detach().clone().view_as(p).requires_grad_(True) for name, p in net.named_parameters()}
    loss = F.mse_loss(torch.func.functional_call(net, shaped, (x,)), y)
    gradient = torch.autograd.grad(loss, list(shaped.values()))
    return loss.item(), torch.cat([g.reshape(-1) for g in gradient])


_BUDGETS = (*DataBudgets.__dataclass_fields__, "newton")


def run(
    loader: Any, calls: list[NewtonCall], epochs: int = 4, module: Fitting | None = None, **options: Any
) -> Fitting:
    """Two epochs of gradient descent, then Newton steps in double precision."""
    budgets = {name: options.pop(name) for name in list(options) if name in _BUDGETS}
    module = module or Fitting()
    make_trainer(epochs, callbacks=[forced(calls, **budgets)], precision="64-true", **options).fit(module, loader)
    return module


@pytest.mark.parametrize(
    ("cases", "batch_size", "accumulate"),
    [(16, 4, 1), (18, 4, 1), (13, 5, 1), (16, 4, 2), (12, 4, 2), (20, 4, 3), (18, 4, 2)],
)
def test_gradient_of_an_epoch_is_that_of_the_data_set(cases: int, batch_size: int, accumulate: int) -> None:
    """Also where the last batch is smaller, and where the last accumulation window is short."""
    calls: list[NewtonCall] = []
    loader = regression_loader(cases, batch_size)
    module = run(loader, calls, accumulate_grad_batches=accumulate)
    assert len(calls) == 2
    for call in calls:
        loss, gradient = full_gradient(module.net, call.parameters, cases, torch.float64)
        assert call.known
        assert call.loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(call.gradient, gradient, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(call.of_objective[1], gradient, rtol=1e-10, atol=1e-14)
        assert call.sizes[0] == -(-cases // batch_size)
        assert call.same_function is None  # the losses tell


def test_uneven_batches_inside_one_accumulation_window() -> None:
    """Sizes 4, 4, 2 accumulated together: what the step is given and its objective are one function."""
    calls: list[NewtonCall] = []
    run(regression_loader(10, 4), calls, accumulate_grad_batches=3)
    for call in calls:
        torch.testing.assert_close(call.gradient, call.of_objective[1], rtol=1e-10, atol=1e-14)
        assert call.loss == pytest.approx(call.of_objective[0], rel=1e-12)


@pytest.mark.parametrize(("budget", "sizes"), [(2, [2, 2, 1]), (3, [3, 2]), (5, [5]), (7, [5]), ("epoch", [5])])
def test_windows_end_when_full_and_with_the_epoch(budget: Any, sizes: list[int]) -> None:
    calls: list[NewtonCall] = []
    run(regression_loader(20, 4), calls, gradient_batches=budget)
    assert [call.sizes[0] for call in calls] == 2 * sizes


def test_windows_end_with_a_limited_epoch() -> None:
    calls: list[NewtonCall] = []
    run(regression_loader(20, 4), calls, limit_train_batches=3)
    assert [call.sizes[0] for call in calls] == [3, 3]


def test_windows_end_with_the_epoch_of_a_stream() -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            return iter(regression_data(12))

    calls: list[NewtonCall] = []
    run(DataLoader(Stream(), batch_size=4), calls)
    assert [call.sizes[0] for call in calls] == [3, 3]


def test_accumulated_batches_count_towards_the_window() -> None:
    calls: list[NewtonCall] = []
    run(regression_loader(32, 4), calls, gradient_batches=4, accumulate_grad_batches=2)
    assert [call.sizes[0] for call in calls] == [4, 4, 4, 4]


class Skipping(Fitting):
    """Returns no loss for the last batch of each epoch, as steps do that find nothing to learn in a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_window_ends_with_the_epoch_even_if_the_last_step_is_skipped() -> None:
    calls: list[NewtonCall] = []
    run(regression_loader(16, 4), calls, module=Skipping())
    assert [call.sizes[0] for call in calls] == [3, 3]
    assert [call.loss for call in calls] == pytest.approx([call.of_objective[0] for call in calls], rel=1e-10)


class Leaving(Fitting):
    """Ends each epoch early, in the way that Lightning offers."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def test_window_ends_with_an_epoch_that_the_module_ends() -> None:
    calls: list[NewtonCall] = []
    run(regression_loader(20, 4), calls, epochs=5, module=Leaving())
    assert calls
    assert {call.sizes[0] for call in calls} == {3}


# ------------------------------------------------------------------------------------------------ shares of the window


class ByBatch(Fitting):
    """Its loss tells which batches were seen: powers of two, plus a little that can be optimized."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_loss", 1.0, on_step=False, on_epoch=True)
        size = sum(p.square().sum() for p in self.net.parameters())
        return 2.0**batch_idx + 1e-9 * size


def seen(value: float, count: int) -> set[int]:
    """The batches whose mean loss this is."""
    number = round(value * count)
    return {index for index in range(20) if number >> index & 1}


def shares(epochs: int = 5) -> list[tuple[set[int], set[int]]]:
    calls: list[NewtonCall] = []
    loader = regression_loader(40, 4)
    run(loader, calls, epochs, module=ByBatch(), adaptive=False, curvature_fraction=0.5, trial_fraction=0.4)
    return [(seen(c.values["curvature"], c.sizes[1]), seen(c.values["trial"], c.sizes[2])) for c in calls]


def test_curvature_and_trials_see_different_batches_each_step_anew() -> None:
    chosen = shares()
    assert len(chosen) == 3
    for curvature, trial in chosen:
        assert (len(curvature), len(trial)) == (5, 4)
        assert not curvature & trial
    assert len({str(pair) for pair in chosen}) == 3


def test_the_choice_of_batches_is_the_same_in_each_run() -> None:
    first = shares()
    torch.manual_seed(99)
    assert shares() == first


# ------------------------------------------------------------------------------------------------ adaptive shares


class Stuck(Fitting):
    """With its weight decay, an objective that decreases so little that every step counts as stuck.

    Args:
        decay: Weight decay, which the loss takes back.
    """

    def __init__(self, decay: float = 0.0) -> None:
        super().__init__(optimizer=sgd(0.0, weight_decay=decay))
        self.decay = decay

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_loss", 1.0, on_step=False, on_epoch=True)
        return 1.0 + (1e-7 - self.decay / 2) * sum(p.square().sum() for p in self.net.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_shares_double_while_steps_achieve_little(decay: float) -> None:
    calls: list[NewtonCall] = []
    slow = {"lr": 0.1, "inner_steps": 1}
    loader = regression_loader(40, 4)
    run(loader, calls, 8, module=Stuck(decay), curvature_fraction=0.1, trial_fraction=0.2, newton=slow)
    assert all(call.record is not None and call.record.accepted for call in calls)
    assert [call.sizes[1:] for call in calls] == [(4, 4), (4, 4), (4, 8), (8, 10), (10, 10), (10, 10)]


def test_shares_stay_where_steps_do_well() -> None:
    """One batch over and over: the first steps keep what they promise."""
    calls: list[NewtonCall] = []
    data = regression_data(4)
    loader = DataLoader(torch.utils.data.ConcatDataset([data] * 10), batch_size=4)
    run(loader, calls, 5, newton={"inner_steps": 1})
    assert [call.sizes[1:] for call in calls] == [(4, 4)] * 3
    assert all(call.record is not None and call.record.accepted for call in calls)


def test_shares_stay_where_they_are_told_to() -> None:
    calls: list[NewtonCall] = []
    run(regression_loader(40, 4), calls, 6, module=Stuck(), adaptive=False)
    assert [call.sizes[1:] for call in calls] == [(4, 4)] * 4


# ------------------------------------------------------------------------------------------------ rejected steps


class Reversed(Fitting):
    """``backward`` gives the opposite of the loss's gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return 2 * loss.detach() - loss


@pytest.mark.parametrize(("epochs", "times"), [(6, 0), (7, 1), (14, 1)])
def test_steps_that_are_never_taken_are_told_of_once(epochs: int, times: int, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[NewtonCall] = []
    run(regression_loader(40, 4), calls, epochs, module=Reversed())
    assert not any(call.record is not None and call.record.accepted for call in calls)
    assert (
        caplog.text.count("None of the last 5 Newton steps was taken, because none lowered the loss, which is ")
        == times
    )


# ------------------------------------------------------------------------------------------------ held data


def test_held_window_is_stepped_on_at_each_later_batch() -> None:
    calls: list[NewtonCall] = []
    everything = {"curvature_fraction": 1.0, "trial_fraction": 1.0}
    module = run(regression_loader(16, 4), calls, gradient_batches="epoch", hold=True, **everything)
    assert [call.sizes[0] for call in calls] == [4] * 5  # one at the end of the first epoch, four in the second
    assert [call.known for call in calls] == [True] + [False] * 4
    assert all(call.same_function for call in calls[1:])
    for call in calls:
        loss, gradient = full_gradient(module.net, call.parameters, 16, torch.float64)
        assert call.loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(call.gradient, gradient, rtol=1e-10, atol=1e-14)
    losses = [call.loss for call in calls]
    assert losses == sorted(losses, reverse=True)


def test_held_data_stay_what_they_were_while_the_loader_goes_on() -> None:
    """With two batches held, every step's loss is that of the first two batches."""
    calls: list[NewtonCall] = []
    module = run(regression_loader(16, 4), calls, gradient_batches=2, hold=True)
    assert len(calls) == 3 + 4
    for call in calls:
        loss, _ = full_gradient(module.net, call.parameters, 8, torch.float64)
        # regression_data(8) are other inputs than the first eight of sixteen, so take those by hand.
        x, y = (t[:8].double() for t in regression_data(16).tensors)
        net = small_net().double()
        nn.utils.vector_to_parameters(call.parameters, net.parameters())
        assert call.loss == pytest.approx(F.mse_loss(net(x), y).item(), rel=1e-12)
        assert call.loss != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    ("at", "options", "sizes"),
    [
        (7, {}, [4, 4]),  # one of four is too few for a step
        (7, {"gradient_batches": 9}, [4, 4]),
        (6, {}, [2, 4, 4]),  # two are stepped on, and not held
        (7, {"gradient_batches": 2}, [1, 2, 2]),
        (6, {"gradient_batches": 3}, [2, 2, 2]),  # a whole one: four batches make two windows
    ],
)
def test_what_is_held_is_a_whole_window(at: int, options: dict[str, Any], sizes: list[int]) -> None:
    """The switch falls inside an epoch of four batches."""
    calls: list[NewtonCall] = []
    optimizer = partial(Noting, calls=calls)
    switch = SwitchToSFN(switch_at_step=at, optimizer=optimizer, hold=True, probe_dim=0, **options)
    make_trainer(4, callbacks=[switch]).fit(Fitting(), regression_loader(16, 4))
    assert [call.sizes[0] for call in calls[: len(sizes)]] == sizes


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [("epoch", [7]), (7, [7]), (8, [7]), (6, [4, 3]), (4, [4, 3]), (3, [3, 2, 2]), (2, [2, 2, 2, 1]), (1, 7 * [1])],
)
def test_an_epoch_is_shared_out_evenly(budget: Any, sizes: list[int]) -> None:
    """No window is larger than asked for, and none is a small rest."""
    calls: list[NewtonCall] = []
    run(regression_loader(14, 2), calls, gradient_batches=budget)
    assert [call.sizes[0] for call in calls[: len(sizes)]] == sizes


@pytest.mark.parametrize(("batches", "sizes"), [(9, [5, 4, 5, 4]), (8, [5, 3, 5, 3]), (7, [5, 5]), (6, [5, 5])])
def test_a_small_rest_of_a_stream_is_let_go(batches: int, sizes: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Nobody knows how long it is, so that it cannot be shared out."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([regression_data(14)[row] for row in range(batches)])

    caplog.set_level("INFO")
    calls: list[NewtonCall] = []
    run(DataLoader(Stream(), batch_size=1), calls, gradient_batches=5)
    assert [call.sizes[0] for call in calls[: len(sizes)]] == sizes
    assert caplog.text.count("No Newton step was taken on the last") == (len(sizes) == 2)


@pytest.mark.parametrize(("more", "steps"), [(3, 1), (4, 2)])
def test_a_run_that_is_cut_short_does_not_end_with_a_step_on_a_few_batches(
    more: int, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One epoch of SGD, one of SFN, and then less or no less than half of one."""
    caplog.set_level("INFO")
    calls: list[NewtonCall] = []
    switch = SwitchToSFN(switch_at_epoch=1, optimizer=partial(Noting, calls=calls), probe_dim=0)
    make_trainer(9, max_steps=8 + 8 + more, callbacks=[switch]).fit(Fitting(), regression_loader(16, 2))
    assert [call.sizes[0] for call in calls] == [8, 4][:steps]
    assert caplog.text.count("No Newton step was taken on the last 3 batch(es)") == 2 - steps


@pytest.mark.parametrize("options", [{}, {"hold": True}], ids=str)
def test_an_epoch_may_be_shorter_than_announced(options: dict[str, Any]) -> None:
    """A stream of four batches, of which Lightning expects up to a thousand."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([regression_data(8)[row] for row in range(8)])

    calls: list[NewtonCall] = []
    switch = SwitchToSFN(switch_at_epoch=1, optimizer=partial(Noting, calls=calls), probe_dim=0, **options)
    trainer = make_trainer(4, limit_train_batches=1000, callbacks=[switch])
    trainer.fit(Fitting(), DataLoader(Stream(), batch_size=2))
    assert [call.sizes[0] for call in calls[:3]] == [4, 4, 4]


@pytest.mark.parametrize(("budget", "sizes"), [(3, [2, 2, 2]), (5, [4, 2]), (6, [6])])
def test_what_is_accumulated_stays_together(budget: int, sizes: list[int]) -> None:
    calls: list[NewtonCall] = []
    switch = SwitchToSFN(
        switch_at_epoch=1, optimizer=partial(Noting, calls=calls), gradient_batches=budget, probe_dim=0
    )
    trainer = make_trainer(2, callbacks=[switch], accumulate_grad_batches=2)
    trainer.fit(Fitting(), regression_loader(12, 2))
    assert [call.sizes[0] for call in calls] == sizes


@pytest.mark.parametrize("options", [{}, {"gradient_batches": 3}, {"hold": True, "gradient_batches": 3}], ids=str)
def test_an_epoch_without_batches_has_no_step(options: dict[str, Any]) -> None:
    class Once(DataLoader[Any]):
        """Has nothing left after its first epoch."""

        def __iter__(self) -> Any:
            batches, self.left = getattr(self, "left", list(super().__iter__())), []
            return iter(batches)

    calls: list[NewtonCall] = []
    switch = SwitchToSFN(switch_at_epoch=0, optimizer=partial(Noting, calls=calls), probe_dim=0, **options)
    make_trainer(2, callbacks=[switch]).fit(Fitting(), Once(regression_data(12), batch_size=4))
    assert len(calls) == 1


@pytest.mark.parametrize(("bad", "taken"), [({0}, 2), ({0, 1, 2}, 0)])
def test_batches_that_are_left_out_do_not_make_a_window(bad: set[int], taken: int) -> None:
    class Failing(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * (torch.nan if self.current_epoch and batch_idx in bad else 1.0)

    calls: list[NewtonCall] = []
    switch = SwitchToSFN(switch_at_epoch=1, optimizer=partial(Noting, calls=calls), probe_dim=0)
    with pytest.warns(UserWarning, match="is not finite"):
        make_trainer(3, callbacks=[switch]).fit(Failing(), regression_loader(16, 4))
    assert [call.sizes[0] for call in calls] == taken * [3]


def test_a_probe_counts_batches_and_not_their_evaluations() -> None:
    """L-BFGS evaluates each batch many times; the gate looks at windows of whole epochs."""
    module = Fitting(optimizer=lambda p: torch.optim.LBFGS(p, 1e-9, max_iter=4, tolerance_grad=0, tolerance_change=0))
    switch = SwitchToSFN(patience=1, min_delta=1e3, require_negative_curvature=True, min_predicted_decrease=0.0)
    make_trainer(4, callbacks=[switch]).fit(module, regression_loader(16, 4))
    assert switch.switched_at_step == 3 * 4


@pytest.mark.parametrize("rounded", [False, True])
def test_a_loss_rounded_in_another_way_is_no_baseline(monkeypatch: pytest.MonkeyPatch, rounded: bool) -> None:
    """Trials then see an objective of their own, with a loss of its own, unless every loss is a replay's."""
    seen: list[tuple[bool, bool]] = []

    class Watching(SaddleFreeNewton):
        def step_on(self, objective: Any, **given: Any) -> Any:
            seen.append((given["loss_and_gradient"] is not None, given["trial"] is objective))
            return super().step_on(objective, **given)

    monkeypatch.setattr("lightning_sfn.trainer.window.rounds_otherwise", lambda trainer, module: rounded)
    callback = forced(optimizer=Watching, hold=True, trial_fraction=1.0)
    make_trainer(4, callbacks=[callback]).fit(Fitting(), regression_loader(16, 8))
    assert seen[:3] == [(True, not rounded), (False, True), (False, True)]


class RoundedInTraining(Fitting):
    """Its loss is rounded where cuDNN may round, as TF32 does on a GPU, and its gradient with it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1.001 if torch.backends.cudnn.allow_tf32 else 1.0)


def test_rounding_in_training_is_no_loss_that_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Replays do not round: whether training does is asked before they begin."""
    known: list[float | None] = []

    class Watching(SaddleFreeNewton):
        def step_on(self, objective: Any, **given: Any) -> Any:
            known.append(None if given["loss_and_gradient"] is None else given["loss_and_gradient"][0])
            return super().step_on(objective, **given)

    monkeypatch.setattr(
        "lightning_sfn.trainer.window.rounds_otherwise", lambda trainer, module: torch.backends.cudnn.allow_tf32
    )
    caplog.set_level("INFO")
    make_trainer(4, callbacks=[forced(optimizer=Watching)]).fit(RoundedInTraining(), regression_loader(16, 8))
    assert known
    assert None not in known
    assert "in a replay" not in caplog.text


# ------------------------------------------------------------------------------------------------ weight decay


def test_weight_decay_of_each_group_is_part_of_the_objective() -> None:
    """On a quadratic, the fixed point is the minimizer of the loss plus half the decay times the squared norm."""

    class Groups(Fitting):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 1))
            nn.init.normal_(self.net.weight)

        def configure_optimizers(self) -> Any:
            net: Any = self.net
            return torch.optim.SGD(
                [
                    {"params": [net.weight], "lr": 0.01, "weight_decay": 0.7},
                    {"params": [net.bias], "lr": 0.02, "weight_decay": 0.2},
                ]
            )

    calls: list[NewtonCall] = []
    module = run(regression_loader(18, 4), calls, epochs=25, module=Groups())
    x, y = (t.double() for t in regression_data(18).tensors)
    design = torch.cat([x, torch.ones(18, 1)], 1).double()
    decay = torch.diag(torch.tensor([0.7, 0.7, 0.7, 0.2], dtype=torch.float64))
    solution = torch.linalg.solve(2 / 18 * design.T @ design + decay, 2 / 18 * design.T @ y).squeeze(1)
    torch.testing.assert_close(flat(module), solution, rtol=1e-6, atol=1e-8)
    first = calls[0]
    residual = design @ first.parameters.unsqueeze(1) - y
    penalty = first.parameters @ decay @ first.parameters / 2
    assert first.loss == pytest.approx((residual.square().mean() + penalty).item(), rel=1e-10)
    torch.testing.assert_close(first.gradient, first.of_objective[1], rtol=1e-9, atol=1e-12)


def test_frozen_parameters_stay_and_are_not_decayed() -> None:
    module = Fitting(small_net(), sgd(0.05, weight_decay=0.3))
    first: Any = module.net[0]
    first.weight.requires_grad_(False)
    before = first.weight.clone()
    calls: list[NewtonCall] = []
    run(regression_loader(16, 4), calls, module=module)
    assert torch.equal(first.weight.float(), before)
    assert calls[0].gradient.numel() == sum(p.numel() for p in module.parameters()) - before.numel()
    assert calls[0].loss == pytest.approx(calls[0].of_objective[0], rel=1e-10)
    assert all(call.record is not None and call.record.accepted for call in calls)


@pytest.mark.parametrize("same_size", [False, True])
def test_a_window_that_layers_were_frozen_in_is_left_out_with_one_warning(same_size: bool) -> None:
    """Gradients of other parameters are of no use, also where there are as many of them."""

    class Alternating(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net[0].requires_grad_(batch_idx < 2)
            if same_size:
                self.net[1].requires_grad_(batch_idx >= 2)
            return super().training_step(batch, batch_idx)

    calls: list[NewtonCall] = []
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    with pytest.warns(UserWarning, match=r"2 batch\(es\) that waited for a Newton step are left out") as caught:
        run(regression_loader(16, 4), calls, module=Alternating(net))
    assert sum("left out" in str(warning.message) for warning in caught) == 1
    assert {call.sizes[0] for call in calls} == {2}


# ------------------------------------------------------------------------------------------------ other batches


class Keyed(Fitting):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["inputs"]["x"], batch["y"]), batch_idx)


def test_dictionary_batches_are_weighted_by_their_size() -> None:
    def collate(rows: list[Any]) -> Any:
        return {"inputs": {"x": torch.stack([r[0] for r in rows])}, "y": torch.stack([r[1] for r in rows])}

    calls: list[NewtonCall] = []
    module = run(regression_loader(18, 4, collate_fn=collate), calls, module=Keyed())
    _, gradient = full_gradient(module.net, calls[0].parameters, 18, torch.float64)
    torch.testing.assert_close(calls[0].gradient, gradient, rtol=1e-10, atol=1e-14)


class Paired(Fitting):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        left, right = batch["left"], batch["right"]
        return super().training_step(tuple(torch.cat(pair) for pair in zip(left, right, strict=True)), batch_idx)


def test_several_loaders_at_once() -> None:
    loaders = CombinedLoader({"left": regression_loader(16, 4), "right": regression_loader(16, 4)}, "min_size")
    calls: list[NewtonCall] = []
    module = run(loaders, calls, module=Paired())
    _, gradient = full_gradient(module.net, calls[0].parameters, 16, torch.float64)
    torch.testing.assert_close(calls[0].gradient, gradient, rtol=1e-10, atol=1e-14)


class Sizeless(Fitting):
    """Its batches hold no tensor, so they count equally."""

    def __init__(self) -> None:
        super().__init__()
        self.data = regression_data(16).tensors

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = self.data
        rows = slice(4 * batch_idx, 4 * batch_idx + 4)
        loss = F.mse_loss(self.net(x[rows].double()), y[rows].double())
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=4)
        return loss


def test_batches_without_a_size_count_equally() -> None:
    loader = DataLoader([None] * 4, batch_size=None, collate_fn=lambda _: object())
    calls: list[NewtonCall] = []
    module = run(loader, calls, module=Sizeless())
    _, gradient = full_gradient(module.net, calls[0].parameters, 16, torch.float64)
    torch.testing.assert_close(calls[0].gradient, gradient, rtol=1e-10, atol=1e-14)
