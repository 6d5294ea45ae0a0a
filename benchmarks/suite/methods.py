"""The methods that race: each is a generator that changes the network and yields after every step."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lightning_sfn import SaddleFreeNewton
from lightning_sfn.newton import AutoPreconditioner, KroneckerFactors
from suite.hessian_free import HessianFree
from suite.kfac import KFAC
from suite.tasks import Problem

__all__ = ["BESIDES", "METHODS", "OURS", "RIVALS", "SEARCHED", "at_edge"]

Method = Callable[..., Iterator[None]]

_PAPER_KRYLOV, _PAPER_INNER = 32, 3  # a basis of the paper's 500 does not fit into such a race

_CURVATURE_SHARE, _TRIAL_SHARE = 0.08, 0.1


def _batches(problem: Problem, size: int) -> Iterator[Tensor]:
    while True:
        yield from problem.shuffled().split(size)


def _first_order(problem: Problem, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    for chosen in _batches(problem, problem.batch):
        optimizer.zero_grad()
        problem.loss(chosen).backward()
        optimizer.step()
        yield


def sgd(problem: Problem, lr: float) -> Iterator[None]:
    """SGD with momentum 0.9."""
    yield from _first_order(problem, torch.optim.SGD(problem.model.parameters(), lr, momentum=0.9))


def adam(problem: Problem, lr: float) -> Iterator[None]:
    """Adam."""
    yield from _first_order(problem, torch.optim.Adam(problem.model.parameters(), lr))


def lbfgs(problem: Problem) -> Iterator[None]:
    """L-BFGS on all data: history 20, strong Wolfe line search."""
    optimizer = torch.optim.LBFGS(
        problem.model.parameters(), max_iter=5, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return float(loss.detach())

    while True:
        optimizer.step(closure)
        yield


def hessian_free(problem: Problem, damping: float) -> Iterator[None]:
    """Hessian-free with Gauss-Newton products on a fresh fifth of the data."""
    optimizer = HessianFree(problem, damping=damping, share=0.2)
    while True:
        optimizer.step()
        yield


def trust_krylov(problem: Problem, radius: float) -> Iterator[None]:
    """Scipy's `trust-krylov` on all data."""
    from suite.trust_krylov import trust_krylov as minimizer  # scipy is for this rival alone

    yield from minimizer(problem, radius)


def kfac(problem: Problem, lr: float, damping: float, share: float, kl_clip: float) -> Iterator[None]:
    """K-FAC on batches of a share of the data."""
    optimizer = KFAC(problem.model, lr, damping, kl_clip=kl_clip)
    few = max(50, problem.cases // 5)
    for chosen in _batches(problem, max(1, round(share * problem.cases))):

        def sampled(chosen: Tensor = chosen[:few]) -> tuple[Tensor, int]:
            output = problem.output(chosen)
            targets = problem.sampled(output)
            terms = targets.numel() if problem.categorical else len(targets)
            return problem.loss_of(output, targets) * terms, terms

        optimizer.step(problem.loss(chosen), sampled)
        yield


def paper(problem: Problem) -> Iterator[None]:
    """The paper's SFN on all data, with a small basis."""
    parameters = list(problem.model.parameters())
    krylov_dim = min(_PAPER_KRYLOV, sum(p.numel() for p in parameters))
    yield from _on_all(
        problem, SaddleFreeNewton.as_in_paper(parameters, krylov_dim=krylov_dim, inner_steps=_PAPER_INNER)
    )


def default(problem: Problem) -> Iterator[None]:
    """`SaddleFreeNewton(params)` on all data."""
    yield from _on_all(problem, SaddleFreeNewton(problem.model.parameters()))


def subspaces(problem: Problem) -> Iterator[None]:
    """The same without quasi-Newton steps."""
    yield from _on_all(problem, SaddleFreeNewton(problem.model.parameters(), secant_steps=0))


def factors(problem: Problem) -> Iterator[None]:
    """`SaddleFreeNewton(params)` without probes."""
    coordinates = AutoPreconditioner()
    coordinates.factors.probes = 0
    yield from _on_all(problem, SaddleFreeNewton(problem.model.parameters(), preconditioner=coordinates))


def diagonal(problem: Problem) -> Iterator[None]:
    """`SaddleFreeNewton(params)` in equilibrated coordinates, on all data."""
    yield from _on_all(problem, SaddleFreeNewton(problem.model.parameters(), preconditioner="diagonal"))


def _on_all(problem: Problem, optimizer: SaddleFreeNewton) -> Iterator[None]:
    while True:
        optimizer.step(problem.loss)
        yield


def recipe(problem: Problem) -> Iterator[None]:
    """SFN in Kronecker-factored coordinates: gradient on all data, products and trials on small fresh parts."""
    yield from _on_parts(problem, heavy_ball=0.0)


def turns(problem: Problem) -> Iterator[None]:
    """The same, in turns with momentum steps."""
    yield from _on_parts(problem, heavy_ball=0.95)


def factors_turns(problem: Problem) -> Iterator[None]:
    """The same without probes."""
    yield from _on_parts(problem, heavy_ball=0.95, probes=0)


def _on_parts(problem: Problem, *, heavy_ball: float, probes: int = 1) -> Iterator[None]:
    optimizer = SaddleFreeNewton(
        problem.model.parameters(),
        inner_steps=1,
        previous_directions=10,
        heavy_ball=heavy_ball,
        preconditioner=KroneckerFactors(problem.model, probes=probes),
    )
    while True:
        curved, judged = problem.some(_CURVATURE_SHARE), problem.some(_TRIAL_SHARE)
        optimizer.step(
            problem.loss,
            curvature_closure=lambda chosen=curved: problem.loss(chosen),
            trial_closure=lambda chosen=judged: problem.loss(chosen),
        )
        yield


def _grid(**values: tuple[float, ...]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


RIVALS: dict[str, Method] = {
    "sgd": sgd,
    "adam": adam,
    "lbfgs": lbfgs,
    "hessian_free": hessian_free,
    "trust_krylov": trust_krylov,
    "kfac": kfac,
}
"""Other people's methods."""

OURS: dict[str, Method] = {
    "paper": paper,
    "diagonal": diagonal,
    "default": default,
    "recipe": recipe,
    "turns": turns,
}
"""Ours."""

BESIDES: dict[str, Method] = {"factors": factors, "factors turns": factors_turns, "subspaces": subspaces}
"""Ours without a part of it: compared with it besides the race."""

METHODS = RIVALS | OURS | BESIDES

SEARCHED: dict[str, list[dict[str, Any]]] = {
    "sgd": _grid(lr=(3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "adam": _grid(lr=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)),
    "hessian_free": _grid(damping=(1e-4, 1e-2, 1.0)),
    "trust_krylov": _grid(radius=(0.1, 1.0, 10.0)),
    "kfac": [
        *_grid(lr=(0.1, 0.3), damping=(1e-2, 0.1, 1.0), share=(0.1,), kl_clip=(1e-3,)),
        *_grid(lr=(0.3,), damping=(0.1,), share=(0.1,), kl_clip=(1e-2,)),
        *_grid(lr=(0.3,), damping=(1e-5, 1e-4, 1e-3), share=(1.0,), kl_clip=(1e-3, 1e-2)),
        *_grid(lr=(0.3,), damping=(3e-6,), share=(1.0,), kl_clip=(1e-2,)),
        *_grid(lr=(0.3,), damping=(1e-4,), share=(1.0,), kl_clip=(3e-2,)),
    ],
}
"""Settings that are tried for each task, with a part of the race's seconds, from a start of its own."""


def at_edge(method: str, settings: dict[str, Any]) -> list[str]:
    """The settings that have the smallest or the largest of the values tried, where more than two were."""
    tried = {name: {candidate[name] for candidate in SEARCHED.get(method, [])} for name in settings}
    return [name for name, values in tried.items() if len(values) > 2 and settings[name] in (min(values), max(values))]
