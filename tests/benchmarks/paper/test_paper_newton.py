"""SFN's arms: parts that grow, and steps that are taken back."""

from dataclasses import replace

import pytest
import torch
from paper_scale.newton import Newton, our_newton, papers_newton
from paper_scale.task import Task

from lightning_sfn.newton import Objective
from lightning_sfn.newton.step import StepRecord


@pytest.fixture
def method(task: Task) -> Newton:
    return our_newton(task.problem(), task.settings)


def flat(method: Newton) -> torch.Tensor:
    return method.problem.parameters.read()


def test_a_step_after_which_the_whole_loss_has_risen_is_taken_back(
    method: Newton, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = flat(method)
    sound = method.optimizer.step_on

    def astray(*_: object, **__: object) -> StepRecord:
        method.problem.parameters.write(before + 1.0)
        return StepRecord(1.0, 0.5, 1.0, accepted=True)

    monkeypatch.setattr(method.optimizer, "step_on", astray)
    method.advance()
    assert not torch.equal(flat(method), before)
    seen = []

    def watched(*arguments: object, **options: object) -> StepRecord:
        seen.append((flat(method), options["same_function"]))
        return sound(*arguments, **options)

    monkeypatch.setattr(method.optimizer, "step_on", watched)
    method.advance()
    assert torch.equal(seen[0][0], before)
    assert seen[0][1] is False
    assert method.state_dict()["growth"] == 2.0


def test_parts_are_fresh_do_not_overlap_and_grow_to_everything(method: Newton, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[float, float]] = []
    count = len(method.problem.cases)

    def refused(
        objective: Objective, *, curvature: Objective | None, trial: Objective | None, **_: object
    ) -> StepRecord:
        sizes.append(tuple(count if part is None else sum(part.sizes) for part in (curvature, trial)))
        return StepRecord(1.0, 1.0, 1.0)

    monkeypatch.setattr(method.optimizer, "step_on", refused)
    for _ in range(4):
        assert not method.finished
        method.advance()
    assert sizes == [(42, 42), (84, 84), (168, 168), (210, 210)]
    assert method.finished


def test_the_papers_sees_everything_with_its_own_options(task: Task) -> None:
    method = papers_newton(task.problem(), task.settings)
    loss = method.problem.objective().value()
    method.advance()
    record = method.optimizer.last_step
    assert record is not None
    assert record.products == task.settings.krylov_dim
    assert record.damping in (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    assert method.problem.objective().value() < loss


def test_a_basis_that_does_not_fit_is_refused(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paper_scale.memory.available_bytes", lambda device: 10**6)
    with pytest.raises(ValueError, match="set krylov_dim to at most"):
        papers_newton(task.problem(), replace(task.settings, krylov_dim=1500))


def test_a_basis_in_bfloat16_learns_as_well(task: Task) -> None:
    losses = []
    for dtype in (None, "bfloat16"):
        method = papers_newton(task.problem(), replace(task.settings, basis_dtype=dtype))
        for _ in range(2):
            method.advance()
        losses.append(method.problem.objective().value())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
