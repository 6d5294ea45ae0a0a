"""The Fisher information matrix: natural gradient (Section 4) is a Newton step with it in the Hessian's place."""

from collections.abc import Iterable

from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, kl_divergence

from lightning_sfn.newton.curvature import CurvatureOperator, HessianOperator
from lightning_sfn.newton.graphs import GraphBudget, Retention
from lightning_sfn.newton.objective import Objective, ObjectiveError
from lightning_sfn.newton.parameters import FlatParameters

__all__ = ["FisherOperator"]


class FisherOperator(CurvatureOperator):
    """The exact Fisher information of a model's predictions, averaged over the cases.

    It is the Hessian, at the present parameters, of the divergence from the present predictions: ``KL(p(x; present) ||
    p(x; parameters))``. That is how natural gradient measures distance, and what the products are computed from.

    The closures return ``(loss, distribution)``: `Categorical`, `Bernoulli` or `Normal`, or `Independent` of one, which
    says what belongs to one case. Its batch dimensions count the cases.

    Args:
        objective: The objective; its closures return pairs.
        parameters: The parameters to differentiate by.
        retention: Whether graphs are kept between products.
        budget: Byte budget for kept graphs; 1 GiB if left out.

    Raises:
        ObjectiveError: At the first product: a closure gives no distribution, or one of another kind.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, requires_grad=True)
        >>> closure = lambda: (x.sum(), Bernoulli(logits=x))
        >>> FisherOperator(Objective([closure]), [x]).matvec(torch.ones(1))  # p (1 - p)
        tensor([0.2500])
    """

    def __init__(
        self,
        objective: Objective,
        parameters: FlatParameters | Iterable[Tensor],
        *,
        retention: Retention = "auto",
        budget: GraphBudget | None = None,
    ) -> None:
        super().__init__(objective, parameters)
        # The random numbers of each part are replayed inside the part's own evaluations, so both see one model.
        divergences = [lambda index=index: _divergence(objective, index) for index in range(len(objective))]
        self._divergences = HessianOperator(
            Objective(divergences, objective.sizes), self.parameters, retention=retention, budget=budget
        )

    @property
    def batch(self) -> int:
        """How many products `matmat` should be asked for at once."""
        return self._divergences.batch

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._divergences.matvec(vector)

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self._divergences.matmat(vectors)

    def close(self) -> None:
        """Drops the retained graphs."""
        self._divergences.close()


def _divergence(objective: Objective, index: int) -> Tensor:
    """Of a part's present predictions from themselves; no method, since the operator holds what evaluates it."""
    distribution = objective.evaluate(index).output
    if not isinstance(distribution, Distribution):
        raise ObjectiveError(
            "curvature='fisher' needs the predicted distribution: let the closure return the pair (loss, "
            "distribution), for instance (loss, torch.distributions.Categorical(logits=output))."
        )
    return kl_divergence(_frozen(distribution), distribution).mean()


def _frozen(distribution: Distribution) -> Distribution:
    """The same distribution with parameters that do not move."""
    if isinstance(distribution, Independent):
        return Independent(_frozen(distribution.base_dist), distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, Normal):
        return Normal(distribution.loc.detach(), distribution.scale.detach())
    if isinstance(distribution, (Categorical, Bernoulli)):
        return type(distribution)(logits=distribution.logits.detach())
    raise ObjectiveError(
        f"curvature='fisher' got a distribution of class {type(distribution).__name__}, but Categorical, Bernoulli, "
        "Normal or Independent of one of them is expected."
    )
