"""A step that trial data alone have judged, and what the objective says of it next."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn import SaddleFreeNewton
from lightning_sfn.newton import FlatParameters, Objective
from lightning_sfn.newton.confirmation import Unconfirmed
from lightning_sfn.newton.processes import Processes, ProcessMean

from .doubles import Listening
from .ranks import Alike, on_ranks


class Steep:
    """``5 x^2``, counted, whose trial data say ``x^2 / 2``: their step of ``-10 x`` ends at 81 times the loss."""

    def __init__(self, start: float = 1.0) -> None:
        self.x = torch.tensor([start], dtype=torch.float64, requires_grad=True)
        self.shift, self.calls = 0.0, 0

    @property
    def at(self) -> float:
        return float(self.x.detach())

    def objective(self) -> Tensor:
        self.calls += 1
        return 5 * self.x.square().sum() + self.shift

    def trial(self) -> Tensor:
        return self.x.square().sum() / 2

    def optimizer(self, **options: Any) -> SaddleFreeNewton:
        plain = {"damping": 1e-13, "inner_steps": 1, "preconditioner": None, "exploration": 0.0}
        return SaddleFreeNewton([self.x], **(plain | options))

    def step(self, optimizer: SaddleFreeNewton, parts: Callable[[], Tensor] | None = None) -> Any:
        optimizer.step(self.objective, curvature_closure=parts or self.trial, trial_closure=parts or self.trial)
        return optimizer.last_step


def test_a_step_that_the_objective_refutes_is_taken_back() -> None:
    steep, damping = Steep(), Listening(1e-13)
    optimizer = steep.optimizer(damping=damping)
    first = steep.step(optimizer)
    assert (first.accepted, first.taken_back) == (True, False)
    assert steep.at == pytest.approx(-9.0)
    second = steep.step(optimizer, parts=steep.objective)
    assert second.taken_back
    assert second.loss_before == 5.0
    assert steep.at == pytest.approx(0.0, abs=1e-12)
    assert second.step_norm == pytest.approx(9.0)  # the way back included
    assert second.gradients == 2
    assert damping.heard == [(True, pytest.approx(1.0)), (False, 0.0), (True, pytest.approx(1.0))]
    assert not steep.step(optimizer).taken_back


def test_a_rule_without_damping_has_none_to_hear_of_a_step_that_was_taken_back() -> None:
    """Levenberg-Marquardt's own feedback wants to have proposed something."""
    steep = Steep()
    optimizer = steep.optimizer(trust_region="newton", damping="levenberg_marquardt")
    steep.step(optimizer)
    assert steep.at == pytest.approx(-9.0)
    before = optimizer.damping.state_dict()
    optimizer.step(steep.objective, trial_closure=steep.objective)
    assert optimizer.last_step is not None
    assert optimizer.last_step.taken_back
    assert optimizer.last_step.loss_before == 5.0
    assert optimizer.damping.state_dict() == before


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_refuted_step_has_shown_is_remembered(shared: bool) -> None:
    """The difference of the gradients, where the one after the step was computed."""
    steep = Steep()
    optimizer = steep.optimizer()
    steep.step(optimizer)
    if shared:  # products have the objective's graphs: its value alone was seen
        optimizer.step(steep.objective, trial_closure=steep.trial)
    else:
        steep.step(optimizer, parts=steep.trial)
    assert optimizer.last_step is not None
    assert (optimizer.last_step.taken_back, optimizer.last_step.gradients) == (True, 1 if shared else 2)
    found = [(float(d.vector), float(d.product)) for d in optimizer.memory.directions if d.product is not None]
    assert found == ([] if shared else [(pytest.approx(-10.0), pytest.approx(-100.0))])


@pytest.mark.parametrize(
    ("heavy_ball", "turn", "end"),
    [
        (0.0, 4.0, 0.0),
        (0.9, 8.0, 0.0),  # a second step in a subspace
        (0.9, 4.0, 1 - 0.1 * math.sqrt(5)),  # a momentum step from where the first began, as long as the radius
    ],
)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_to_where_the_objective_is_not_finite_is_taken_back(
    bad: float, heavy_ball: float, turn: float, end: float
) -> None:
    steep = Steep()
    optimizer = steep.optimizer(heavy_ball=heavy_ball)
    if optimizer._glide is not None:
        optimizer._glide.pace.lengths["subspace"] = turn
    steep.step(optimizer)

    def closure() -> Tensor:
        return steep.objective() * (bad if steep.at < -1 else 1.0)

    optimizer.step(closure, curvature_closure=steep.objective, trial_closure=steep.trial)
    assert optimizer.last_step is not None
    assert optimizer.last_step.taken_back
    assert steep.at == pytest.approx(end, abs=1e-12)


def test_a_gradient_that_is_not_finite_refutes_a_step_too() -> None:
    steep = Steep()
    optimizer = steep.optimizer()
    steep.step(optimizer)

    def closure() -> Tensor:  # 0 where the step ends, with the slope of a root at 0
        return steep.objective() if steep.at > -1 else (steep.x - steep.x.detach()).sqrt().sum()

    optimizer.step(closure, curvature_closure=steep.objective, trial_closure=steep.trial)
    assert optimizer.last_step is not None
    assert optimizer.last_step.taken_back
    assert steep.at == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("shift", "moved", "same", "back"),
    [
        (0.0, 0.0, None, True),
        (1e-6, 0.0, None, True),  # rounding
        (1.0, 0.0, None, False),  # other data: the loss where the step began is another
        (0.0, 1e-3, None, False),  # somebody else has changed the parameters
        (1.0, 0.0, True, True),  # the caller knows
        (0.0, 0.0, False, False),
        (-500.0, 0.0, True, False),  # the loss is lower
    ],
)
def test_only_a_higher_loss_of_the_same_function_at_the_same_parameters_refutes(
    shift: float, moved: float, same: bool | None, back: bool
) -> None:
    steep = Steep()
    parameters = FlatParameters([steep.x])
    with torch.no_grad():
        steep.x.fill_(-9.0)
        waiting = Unconfirmed.after(torch.ones(1, dtype=torch.float64), 5.0, parameters)
        steep.x.add_(moved)
        steep.shift = shift
        there = steep.at
        loss = float(steep.objective())
        assert waiting.take_back(parameters, Objective([steep.objective]), loss, same) == back
    assert steep.at == (1.0 if back else there)


def test_a_rise_within_rounding_is_none() -> None:
    steep = Steep()
    waiting = Unconfirmed.after(torch.ones(1, dtype=torch.float64), -5.0, FlatParameters([steep.x]))
    for loss, refuted in ((-5.00004, False), (-4.99996, False), (-4.99994, True)):
        assert waiting.take_back(FlatParameters([steep.x]), Objective([steep.objective]), loss, True) == refuted


def test_a_confirmed_step_costs_nothing_or_one_evaluation() -> None:
    """One where gradient and products share graphs, which belong to the parameters as they are."""
    steep = Steep()
    optimizer = steep.optimizer(damping=100.0)
    optimizer.step(steep.objective, curvature_closure=steep.trial, trial_closure=steep.trial)
    before = steep.calls
    optimizer.step(steep.objective, curvature_closure=steep.trial, trial_closure=steep.trial)
    assert steep.calls - before == 1
    before = steep.calls
    optimizer.step(steep.objective, trial_closure=steep.trial)
    assert steep.calls - before == 2  # and once for the graph of loss, gradient and products


def test_steps_that_the_objective_has_judged_do_not_wait() -> None:
    steep = Steep()
    optimizer = steep.optimizer(damping=100.0, inner_steps=2)
    steep.step(optimizer)
    waiting = optimizer._carried.unconfirmed
    assert waiting is not None
    assert waiting.loss < 5.0  # the first of the two steps is confirmed by the second's gradient
    assert waiting.loss == pytest.approx(5 * float(waiting.origin) ** 2)
    optimizer.step(steep.objective)
    assert optimizer._carried.unconfirmed is None


def test_a_refuted_inner_step_leaves_none_to_wait() -> None:
    steep = Steep()
    optimizer = steep.optimizer(inner_steps=2)
    steep.step(optimizer)
    assert steep.at == 1.0
    assert optimizer._carried.unconfirmed is None


def test_a_failed_step_changes_nothing_of_it() -> None:
    steep = Steep()
    optimizer = steep.optimizer()
    steep.step(optimizer)
    there = steep.at
    waiting = optimizer._carried.unconfirmed

    def broken() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(steep.objective, curvature_closure=broken, trial_closure=steep.trial)
    assert steep.at == there
    assert optimizer._carried.unconfirmed is waiting
    assert steep.step(optimizer, parts=steep.objective).taken_back


def test_a_resumed_run_takes_it_back_as_well() -> None:
    steep, again = Steep(), Steep()
    optimizer, resumed = steep.optimizer(), again.optimizer()
    steep.step(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        again.x.copy_(steep.x)
    resumed.load_state_dict(state)
    for one, other in ((steep, optimizer), (again, resumed)):
        assert one.step(other).taken_back
    assert steep.at == again.at


def test_a_state_from_before_there_were_such_steps_loads() -> None:
    optimizer = Steep().optimizer()
    state = copy.deepcopy(optimizer.state_dict())
    del state["newton"]["unconfirmed"]
    optimizer.load_state_dict(state)
    assert optimizer._carried.unconfirmed is None


def test_a_step_of_other_parameters_is_forgotten() -> None:
    steep = Steep()
    optimizer = steep.optimizer()
    steep.step(optimizer)
    optimizer.add_param_group({"params": [torch.zeros(1, dtype=torch.float64, requires_grad=True)]})
    assert not steep.step(optimizer).taken_back


def test_rank_zero_says_whether_the_parameters_are_the_same() -> None:
    class Other(Alike):
        def from_first(self, tensor: Tensor) -> Tensor:
            return torch.zeros_like(tensor)

    steep = Steep()
    waiting = Unconfirmed.after(torch.zeros(1, dtype=torch.float64), 0.0, FlatParameters([steep.x]))
    for processes, back in ((Other(), False), (Alike(), True)):
        objective = Objective([steep.objective], reduce=ProcessMean(processes))
        assert waiting.take_back(FlatParameters([steep.x]), objective, 5.0, True) == back


def _two_steps(sharded: bool) -> tuple[float, bool]:
    steep, rank = Steep(), dist.get_rank()
    steep.shift = float(rank)
    processes = Processes()
    optimizer = steep.optimizer(processes=processes, basis="sharded" if sharded else "replicated")
    steep.step(optimizer)
    record = steep.step(optimizer, parts=steep.objective)
    return steep.at, record.taken_back


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_take_a_step_back_together(sharded: bool) -> None:
    results = on_ranks(2, _two_steps, sharded)
    assert results == [(pytest.approx(0.0, abs=1e-12), True)] * 2


@pytest.mark.parametrize(("options", "seed"), [({}, 10), ({"damping": "grid"}, 15)], ids=str)
def test_a_step_that_takes_back_is_the_same_after_the_state_was_saved(options: dict[str, Any], seed: int) -> None:
    """Bit for bit, after each of fourteen steps on parts of a few cases."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 2))
    inputs = torch.randn(64, 6)
    classes = (inputs[:, 0] * inputs[:, 1] > 0).long()

    def loss(model: nn.Module, rows: Tensor) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(inputs[rows]), classes[rows])

    optimizer, refuted = SaddleFreeNewton(net.parameters(), secant_steps=0, **options), 0
    for step in range(14):
        twin = copy.deepcopy(net)
        resumed = SaddleFreeNewton(twin.parameters(), secant_steps=0, **options)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        order = torch.randperm(64, generator=torch.Generator().manual_seed(step))
        for model, each in ((net, optimizer), (twin, resumed)):
            whole, part, trial = (loss(model, rows) for rows in (torch.arange(64), order[:16], order[16:28]))
            each.step(whole, curvature_closure=part, trial_closure=trial)
        refuted += optimizer.last_step.taken_back
        assert all(map(torch.equal, net.parameters(), twin.parameters())), step
        assert resumed.last_step == optimizer.last_step
    assert refuted
