"""Saddle-free Newton on the whole training set: the paper's, and ours."""

from typing import Any

import torch
from torch import Tensor

from lightning_sfn.experiments.plateau import Problem
from lightning_sfn.newton import Objective, SaddleFreeNewton
from lightning_sfn.newton.coordinates import make_preconditioner
from lightning_sfn.newton.curvature import gradient_of
from paper_scale.memory import require_room
from paper_scale.method import Counts
from paper_scale.settings import Settings

__all__ = ["Newton", "our_newton", "papers_newton"]

_PROGRESS = 1e-4  # a step that lowers the loss by a smaller share asks for more data


class Newton:
    """Outer steps with three data budgets: the gradient on all images, products and trial losses on parts of them.

    Both parts are drawn anew at each step. They double after a step that was refused, taken back, or hardly lowered the
    loss, and halve after a good one. The loss on all images, which the next gradient brings for nothing, has the last
    word: a step after which it has risen is taken back.

    Args:
        problem: The problem.
        optimizer: Over its parameters.
        curvature_share: Share of the images that products see.
        trial_share: Share that trial losses see.
        seed: Of the draws.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: SaddleFreeNewton,
        *,
        curvature_share: float = 1.0,
        trial_share: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.problem, self.counts, self.optimizer = problem, Counts(), optimizer
        self._shares = (curvature_share, trial_share)
        self._growth = 1.0
        self._generator = torch.Generator().manual_seed(seed)
        self._whole = problem.objective()
        self._before: tuple[float, Tensor, Tensor] | None = None  # loss, gradient and parameters before the last step
        self._refused = False

    @property
    def finished(self) -> bool:
        """Whether the same step would be refused for ever, because it sees all images already."""
        return self._refused and min(self._shares) * self._growth >= 1

    def advance(self) -> None:
        """One outer step."""
        parameters = self.problem.parameters
        loss, gradient = gradient_of(self._whole, parameters)
        self.counts.gradients += 1
        undone = self._before is not None and not loss <= self._before[0]
        if undone and self._before is not None:
            loss, gradient, point = self._before
            parameters.write(point)
            self.optimizer.memory.abandon()
        self._adapt(undone, loss)
        self._before = (loss, gradient, parameters.read())
        order = torch.randperm(len(self.problem.cases), generator=self._generator).to(self.problem.cases.device)
        record = self.optimizer.step_on(
            self._whole,
            curvature=self._part(order, self._shares[0]),
            trial=self._part(order.flip(0), self._shares[1]),
            loss_and_gradient=(loss, gradient.clone()),
            same_function=not undone,
        )
        self._refused = not record.accepted
        self.counts.updates += 1
        self.counts.products += record.products
        self.counts.gradients += record.gradients - 1  # the first was taken here
        self.counts.trials += record.trials
        self.counts.accepted += record.accepted

    def _adapt(self, undone: bool, loss: float) -> None:
        if self._before is None:
            return
        poor = undone or self._refused or self._before[0] - loss < _PROGRESS * abs(loss)
        largest = 1 / min(self._shares)
        self._growth = min(self._growth * 2, largest) if poor else max(self._growth / 2, 1.0)

    def _part(self, order: Tensor, share: float) -> Objective | None:
        count = min(len(order), round(share * self._growth * len(order)))
        return None if count == len(order) else self.problem.objective(order[:count])

    def state_dict(self) -> dict[str, Any]:
        """The optimizer, the draws, the growth and what a step may be taken back to."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "growth": self._growth,
            "before": self._before,
            "refused": self._refused,
            "counts": self.counts.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        self._growth, self._before, self._refused = state["growth"], state["before"], state["refused"]
        self.counts = Counts(**state["counts"])


def papers_newton(problem: Problem, settings: Settings) -> Newton:
    """The paper's method: everything on all images, a large Krylov space, its own damping grid.

    Args:
        problem: The problem.
        settings: Sizes.

    Raises:
        ValueError: The basis does not fit into memory.
    """
    size = problem.parameters.size
    krylov_dim = min(settings.krylov_dim, size)
    require_room(
        size,
        krylov_dim,
        device=problem.parameters.device,
        basis_dtype=settings.basis_dtype,
        graphs=settings.graph_bytes,
    )
    optimizer = SaddleFreeNewton.as_in_paper(
        problem.model.parameters(),
        krylov_dim=krylov_dim,
        inner_steps=settings.inner_steps,
        basis_dtype=settings.basis_dtype,
        graph_bytes=settings.graph_bytes,
        max_step_norm=settings.max_step_norm,
        seed=settings.seed,
    )
    return Newton(problem, optimizer, seed=settings.seed)


def our_newton(problem: Problem, settings: Settings) -> Newton:
    """A small Krylov space in the preconditioner's coordinates, with a memory of steps and three data budgets.

    Args:
        problem: The problem.
        settings: Sizes.
    """
    optimizer = SaddleFreeNewton(
        problem.model.parameters(),
        krylov_dim=settings.our_krylov_dim,
        inner_steps=settings.our_inner_steps,
        previous_directions=settings.previous_directions,
        secant_steps=0,  # its steps are taken back by rules of its own
        preconditioner=make_preconditioner(settings.preconditioner),
        graph_bytes=settings.graph_bytes,
        max_step_norm=settings.max_step_norm,
        seed=settings.seed,
    )
    return Newton(
        problem,
        optimizer,
        curvature_share=settings.curvature_share,
        trial_share=settings.trial_share,
        seed=settings.seed,
    )
