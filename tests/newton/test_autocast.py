"""Steps and spectra inside of autocast are those of closures that enter autocast themselves."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from lightning_sfn.newton import HessianOperator, Objective, SaddleFreeNewton, hessian_spectrum
from lightning_sfn.newton.autocast import Autocast, without_autocast
from lightning_sfn.newton.outlook import outlook_of
from lightning_sfn.newton.subspace_descent import KrylovSubspaceDescent


class Task:
    """A classifier whose closure says in which dtype it computed."""

    def __init__(self, *, inside: bool) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.x, self.y, self.inside = torch.randn(20, 4), torch.randint(3, (20,)), inside
        self.dtypes: set[torch.dtype] = set()

    def autocast(self, on: bool) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()

    def closure(self) -> Any:
        with self.autocast(self.inside):
            logits = self.model(self.x)
            self.dtypes.add(logits.dtype)
            return F.cross_entropy(logits, self.y)

    def pair(self, curvature: str) -> Callable[[], Any]:
        def closure() -> Any:
            with self.autocast(self.inside):
                logits = self.model(self.x)
                losses = F.cross_entropy(logits, self.y, reduction="none")
            others = {"gauss_newton": logits, "fisher": Categorical(logits=logits), "gradient_covariance": losses}
            return (losses.mean(), others[curvature]) if curvature in others else losses.mean()

        return closure

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preconditioner": None},
        {"preconditioner": "diagonal", "heavy_ball": 0.9},
        {"krylov_dim": "full"},
        {"hvp": "finite_difference"},
        {"hvp": "recompute"},
        {"basis_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_steps_inside_of_autocast(options: dict[str, Any]) -> None:
    tasks = [Task(inside=inside) for inside in (False, True)]
    losses: list[list[float]] = [[], []]
    for task, seen in zip(tasks, losses, strict=True):
        optimizer = SaddleFreeNewton(task.model.parameters(), **options)
        with task.autocast(not task.inside):
            for _ in range(4):
                seen.append(float(optimizer.step(task.closure, trial_closure=task.closure)))
            assert torch.is_autocast_enabled("cpu") is not task.inside
        assert task.dtypes == {torch.bfloat16}
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert torch.equal(tasks[0].weights, tasks[1].weights)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher", "gradient_covariance"])
def test_spectra_inside_of_autocast(curvature: Any) -> None:
    spectra = []
    for inside in (False, True):
        task = Task(inside=inside)
        with task.autocast(not inside):
            closure, parameters = task.pair(curvature), task.model.parameters()
            spectra.append(hessian_spectrum(closure, parameters, 8, curvature=curvature, density_probes=1))
    assert torch.equal(spectra[0].eigenvalues, spectra[1].eigenvalues)
    assert spectra[0].lambda_max > 0
    assert spectra[0].to_dict() == spectra[1].to_dict()


def test_outlooks_inside_of_autocast() -> None:
    outlooks = []
    for inside in (False, True):
        task = Task(inside=inside)
        with task.autocast(not inside):
            operator = HessianOperator(Objective([task.closure]), task.model.parameters())
            outlooks.append(outlook_of(operator, 8))
        assert task.dtypes == {torch.bfloat16}
    assert outlooks[0] == outlooks[1]


def test_subspace_descent_inside_of_autocast() -> None:
    tasks = [Task(inside=inside) for inside in (False, True)]
    for task in tasks:
        optimizer = KrylovSubspaceDescent(task.model.parameters(), krylov_dim=4)
        with task.autocast(not task.inside):
            optimizer.step(task.closure)
        assert task.dtypes == {torch.bfloat16}
    assert torch.equal(tasks[0].weights, tasks[1].weights)


def test_what_was_cast_before_a_step_is_cast_anew_after_it() -> None:
    """Autocast keeps the weights that it has cast, which a step changes."""
    task = Task(inside=False)
    optimizer = SaddleFreeNewton(task.model.parameters())
    with task.autocast(True):
        before = float(task.closure().detach())
        assert float(optimizer.step(task.closure)) == before
        kept = task.model(task.x)
    with task.autocast(True):
        assert torch.equal(kept, task.model(task.x))


def test_an_objective_keeps_the_precision_of_where_it_was_made() -> None:
    task = Task(inside=False)
    with task.autocast(True):
        objective = Objective([task.closure])
    for each in (objective, objective.local()):
        task.dtypes.clear()
        each.value()
        assert task.dtypes == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")


def test_nothing_is_changed_where_there_is_no_autocast() -> None:
    with without_autocast(), Autocast().restored():
        assert not torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", torch.bfloat16), without_autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
