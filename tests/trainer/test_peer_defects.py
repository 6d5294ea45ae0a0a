"""Mistakes that other second-order optimizers made, each with a test that would catch it here."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor

from lightning_sfn import SaddleFreeNewton, SwitchToSFN, hessian_spectrum
from lightning_sfn.newton.curvature import HessianOperator
from lightning_sfn.newton.krylov import lanczos
from lightning_sfn.newton.objective import Objective

from .modules import Factorised, Fitting, factorised_loader, flat, make_trainer, regression_loader

D = torch.float64


def bowl(x: Tensor) -> Tensor:
    return (torch.tensor([1.0, 4.0, 9.0], dtype=D) * x**2).sum() / 2


def point() -> Tensor:
    return torch.tensor([3.0, -2.0, 1.0], dtype=D, requires_grad=True)


def test_the_predicted_decrease_is_that_of_the_step_and_not_of_the_parameters() -> None:
    """On a quadratic the prediction is the decrease itself."""
    x = point()
    optimizer = SaddleFreeNewton([x], krylov_dim=3, damping=1.0, inner_steps=1, preconditioner=None, exploration=0.0)
    before = float(optimizer.step(lambda: bowl(x)))
    assert optimizer.last_step is not None
    assert optimizer.last_step.predicted_decrease == pytest.approx(before - float(bowl(x.detach())), rel=1e-10)


def test_inner_steps_use_fresh_gradients() -> None:
    """Two half steps on a quadratic: a stale gradient would lead to zero, fresh ones to a quarter."""
    x, start = point(), point().detach()
    optimizer = SaddleFreeNewton([x], 0.5, krylov_dim=3, damping=1e-12, inner_steps=2, preconditioner=None)
    optimizer.step(lambda: bowl(x))
    torch.testing.assert_close(x.detach(), start / 4)


def test_a_trial_loss_that_is_no_number_is_no_improvement() -> None:
    """Beyond one, the loss has no value; the Newton step from 0.9 ends there."""
    x = torch.tensor([0.9], dtype=D, requires_grad=True)
    optimizer = SaddleFreeNewton([x], krylov_dim=1)
    for _ in range(5):
        optimizer.step(lambda: -x.sum() + 0 * torch.sqrt(1 - x).sum() + 0.01 * (x**2).sum())
    assert bool(torch.isfinite(x).all())
    assert float(x.detach()) >= 0.9


@pytest.mark.parametrize("rule", ["saddle_free", "newton", "damped_newton", "truncated_newton", "gradient"])
def test_every_name_of_a_rule_leads_to_a_step(rule: str) -> None:
    x = point()
    loss = SaddleFreeNewton([x], 0.1, krylov_dim=3, trust_region=rule).step(lambda: bowl(x))
    assert bowl(x) < loss


def test_rules_differ_where_curvature_is_negative() -> None:
    ends = {}
    for rule in ("saddle_free", "newton"):
        x = torch.tensor([1.0, 0.1], dtype=D, requires_grad=True)
        optimizer = SaddleFreeNewton([x], krylov_dim=2, trust_region=rule, damping=1e-6, inner_steps=1)
        optimizer.step(lambda x=x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4)
        ends[rule] = abs(float(x.detach()[1]))
    assert ends["saddle_free"] > 0.15 > ends["newton"]


def test_the_preconditioner_is_used() -> None:
    """On an ill-conditioned diagonal one Krylov vector goes further with it."""
    losses = []
    scales = torch.logspace(0, 4, 8, dtype=D)
    for preconditioner in (None, "diagonal"):
        x = torch.ones(8, dtype=D, requires_grad=True)
        optimizer = SaddleFreeNewton([x], krylov_dim=1, previous_directions=0, preconditioner=preconditioner)
        for _ in range(6):
            optimizer.step(lambda x=x: (scales * x**2).sum())
        losses.append(float((scales * x.detach() ** 2).sum()))
    assert losses[1] < 0.1 * losses[0]


def test_the_last_update_joins_the_subspace() -> None:
    x = torch.linspace(0.5, 1.5, 12, dtype=D).requires_grad_(True)
    optimizer = SaddleFreeNewton.as_in_paper([x], krylov_dim=3, inner_steps=1)
    dims = []
    for _ in range(3):
        optimizer.step(lambda: (x**4).sum() + (x[1:] * x[:-1]).sum())
        assert optimizer.last_step is not None
        dims.append(optimizer.last_step.subspace_dim)
    assert dims == [3, 4, 4]


def test_vectors_are_orthogonal_whatever_the_sign_and_negative_values_keep_their_vectors() -> None:
    diagonal = torch.cat([torch.tensor([-100.0]), torch.linspace(-1e-3, 1e-3, 300), torch.tensor([50.0])])
    space = lanczos(lambda v: diagonal * v, torch.ones(302), 60, generator=torch.Generator().manual_seed(0))
    products = space.basis.double() @ space.basis.double().T
    assert float((products - torch.eye(len(space), dtype=D)).abs().max()) < 1e-5
    assert float(space.eigenvalues[0]) == pytest.approx(-100.0, rel=1e-5)
    assert float(space.ritz_vector(0)[0].abs()) == pytest.approx(1.0, abs=1e-4)
    assert int((space.eigenvalues < -50).sum()) == 1  # and no copy of it


def test_no_graph_outlives_a_product() -> None:
    """`backward(create_graph=True)` ties a cycle from each parameter's gradient to the graph."""
    x = point()

    def graphs() -> int:
        return sum(issubclass(type(thing), Tensor) and thing.grad_fn is not None for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = graphs()
        for _ in range(5):
            operator = HessianOperator(Objective([lambda: bowl(x) + (x**4).sum()]), [x])
            operator.matvec(torch.ones(3, dtype=D))
            operator.close()
        after = graphs()
    finally:
        gc.enable()
    assert x.grad is None
    assert after == before


def test_spectra_of_symmetric_matrices_are_real_and_sorted() -> None:
    x = point()
    values = hessian_spectrum(lambda: bowl(x), [x], krylov_dim=3).eigenvalues
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, torch.tensor([1.0, 4.0, 9.0], dtype=D))


def test_the_switch_really_changes_who_steps() -> None:
    """A callback that mutates the list of optimizers goes on stepping the old one, in silence."""
    module, ends = Fitting(), []

    class Noting(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            ends.append(flat(module))

    callback = SwitchToSFN(switch_at_epoch=1, probe_dim=0, optimizer=partial(SaddleFreeNewton, lr=0.0))
    make_trainer(2, callbacks=[callback, Noting()]).fit(module, regression_loader())
    assert not torch.equal(ends[2], ends[3])  # gradient descent moves
    assert all(torch.equal(end, ends[3]) for end in ends[4:])  # Newton steps of length zero do not


def test_a_mean_gradient_meets_a_mean_hessian() -> None:
    """Sums on one side and means on the other would scale the step by the number of batches."""
    callback = SwitchToSFN(switch_at_epoch=0, probe_dim=8, curvature_fraction=1.0, trial_fraction=1.0)
    module = Factorised(scale=0.1)
    x, y = factorised_loader().dataset.tensors  # type: ignore[attr-defined]
    whole = hessian_spectrum(
        lambda: (x @ module.a.T @ module.b.T - y).square().sum(1).mean(), [module.a, module.b], krylov_dim=32
    )
    make_trainer(1, callbacks=[callback]).fit(module, factorised_loader())
    assert callback.report is not None
    assert callback.report.spectrum_at_switch is not None
    assert callback.report.spectrum_at_switch.lambda_max == pytest.approx(whole.lambda_max, rel=1e-2)
    assert callback.report.spectrum_at_switch.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
