"""Updates of first order against formulas and torch's optimizers, and the schedule against the published one."""

import math

import pytest
import torch
from paper_scale.first_order import Adam, Captured, FirstOrder, Momentum, Rule, Schedule
from paper_scale.task import Task
from torch import Tensor


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_sutskever(nesterov: bool) -> None:
    curvatures = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)
    point = torch.ones(3, dtype=torch.float64)
    rule = Momentum(point, nesterov=nesterov)
    theta, velocity = point.clone(), torch.zeros(3, dtype=torch.float64)
    for rate, momentum in [(0.01, 0.5), (0.02, 0.9), (0.005, 0.99), (0.01, 0.9)] * 3:
        where = theta + momentum * velocity if nesterov else theta  # Equations 1 to 4
        velocity = momentum * velocity - rate * curvatures * where
        theta = theta + velocity
        rate_, momentum_ = torch.tensor(rate, dtype=torch.float64), torch.tensor(momentum, dtype=torch.float64)
        rule.before(point, momentum_)
        rule.after(point, curvatures * point, rate_, momentum_)
        torch.testing.assert_close(point, theta, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("name", "max_grad_norm"), [("adam", None), ("sgd", None), ("sgd", 1.0)])
def test_epochs_are_those_of_a_plain_loop(task: Task, name: str, max_grad_norm: float | None) -> None:
    schedule = Schedule(1e-2, 10, decays=name == "adam", momentum=0.0)

    def rule(point: Tensor) -> Rule:
        return Adam(point) if name == "adam" else Momentum(point, nesterov=False)

    method = FirstOrder(task.problem(), rule, schedule, batch_size=50, seed=3, max_grad_norm=max_grad_norm)
    while not method.finished:
        method.advance()

    plain = task.problem()
    kind = torch.optim.Adam if name == "adam" else torch.optim.SGD
    optimizer = kind(plain.model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(3)
    update = 0
    while update < 10:
        order = torch.randperm(len(task.train), generator=generator)
        for rows in torch.split(order, 50)[: min(4, 10 - update)]:
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - update / 10) if name == "adam" else 1e-2
            optimizer.zero_grad()
            plain.loss(task.train[rows]).backward()
            torch.nn.utils.clip_grad_norm_(plain.model.parameters(), max_grad_norm or math.inf)
            optimizer.step()
            update += 1
    assert method.counts.updates == 10
    assert method.counts.gradients == pytest.approx(10 * 50 / 210)
    for ours, theirs in zip(method.problem.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_schedule_is_the_published_one() -> None:
    schedule = Schedule(0.05, 750_000, momentum=0.995, tail=1000)
    momenta = {0: 0.5, 249: 0.5, 250: 0.75, 500: 1 - 1 / 6, 12_250: 0.99, 700_000: 0.995, 749_000: 0.9, 748_999: 0.995}
    assert {update: schedule.at(update)[1] for update in momenta} == pytest.approx(momenta)
    assert {schedule.at(update)[0] for update in momenta} == {0.05}
    decayed = Schedule(0.01, 100, decays=True)
    assert [decayed.at(update) for update in (0, 50, 100)] == [(0.01, 0.0), (0.005, 0.0), (0.0, 0.0)]


def test_parameters_stay_parameters_of_the_model(task: Task) -> None:
    problem = task.problem()
    before = problem.metric()
    method = FirstOrder(
        problem, lambda point: Momentum(point, nesterov=True), Schedule(0.01, 4, 0.9), batch_size=50, seed=0
    )
    assert problem.metric() == before
    method.advance()
    assert problem.metric() < before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["adam", "nesterov"])
def test_captured_updates_are_the_eager_ones(task: Task, name: str) -> None:
    def rule(point: Tensor) -> Rule:
        return Adam(point) if name == "adam" else Momentum(point, nesterov=True)

    ends = []
    for device in ("cpu", "cuda"):
        there = Task(task.settings, task.train.to(device), task.test.to(device))
        method = FirstOrder(there.problem(), rule, Schedule(1e-3, 12, 0.9), batch_size=50, seed=0)
        while not method.finished:
            method.advance()
        ends.append(torch.cat([p.detach().flatten().cpu() for p in method.problem.model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)


def test_without_cuda_the_function_itself_runs() -> None:
    calls: list[int] = []
    Captured(lambda: calls.append(1), (torch.zeros(1),))()
    assert calls == [1]
