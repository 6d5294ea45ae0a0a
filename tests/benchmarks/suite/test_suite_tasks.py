"""Every task builds, small and from embedded data, and starts where its first-order phase ended."""

from pathlib import Path

import pytest
import torch
from suite.networks import Recurrent, symmetric_autoencoder
from suite.tasks import EVERY, TASKS, Problem
from torch import nn
from torch.nn.utils import parameters_to_vector


@pytest.mark.parametrize("name", EVERY)
def test_a_task_starts_at_a_finite_loss_with_a_gradient(name: str, tmp_path: Path) -> None:
    problem = EVERY[name].tiny().start(0, tmp_path, tmp_path)
    loss = problem.loss()
    gradients = torch.autograd.grad(loss, list(problem.model.parameters()))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any((g != 0).any() for g in gradients)


def test_a_start_is_kept_and_belongs_to_its_seed(tmp_path: Path) -> None:
    task = TASKS["mnist escape"].tiny()
    first = parameters_to_vector(task.start(0, tmp_path, tmp_path).model.parameters())
    (kept,) = tmp_path.glob("mnist escape-0-*.pt")
    torch.save({k: v + 1 for k, v in torch.load(kept).items()}, kept)
    again = parameters_to_vector(task.start(0, tmp_path, tmp_path).model.parameters())
    torch.testing.assert_close(again, first + 1)
    other = parameters_to_vector(task.start(1, tmp_path, tmp_path).model.parameters())
    assert not torch.allclose(other, first)


def test_half_of_every_kind_is_held_out() -> None:
    for kind in ("escape", "last mile", "recurrent"):
        halves = {task.tuning for task in TASKS.values() if task.kind == kind}
        assert halves == {True, False}


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data"):
        TASKS["cifar escape"].start(0, tmp_path, tmp_path)


def test_the_gated_cell_is_that_of_torch() -> None:
    model = Recurrent(7, 5, "gru")
    reference = nn.GRU(3 * 5, 5, batch_first=True)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(torch.eye(15))
        reference.bias_ih_l0.zero_()
        reference.weight_hh_l0.copy_(model.recurrent.weight)
        reference.bias_hh_l0.copy_(model.recurrent.bias)
        nn.init.normal_(model.recurrent.bias)
        reference.bias_hh_l0.copy_(model.recurrent.bias)
    characters = torch.randint(7, (2, 6))
    # Ours has the gates in the order new, reset, keep; torch's is reset, keep (called update), new.
    order = torch.cat([torch.arange(5, 10), torch.arange(10, 15), torch.arange(5)])
    with torch.no_grad():
        reference.weight_hh_l0.copy_(model.recurrent.weight[order])
        reference.bias_hh_l0.copy_(model.recurrent.bias[order])
        states, _ = reference(model.input(characters)[..., order])
        torch.testing.assert_close(model(characters), model.output(states))


def test_the_symmetric_start_is_symmetric_without_noise() -> None:
    model = symmetric_autoencoder((10, 6, 3), 0.0)
    problem = Problem(model, inputs := torch.rand(4, 10), inputs, 4, categorical=False)
    gradient = torch.autograd.grad(problem.loss(), model[0].weight)[0]
    torch.testing.assert_close(gradient, gradient[:1].expand_as(gradient))


def test_sampled_targets_follow_the_likelihood() -> None:
    problem = Problem(nn.Identity(), torch.zeros(1), torch.zeros(1), 1, categorical=False)
    drawn = problem.sampled(torch.full((20000, 1), 3.0))
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.03)
    assert drawn.var().item() == pytest.approx(0.5, abs=0.03)
    problem.categorical = True
    drawn = problem.sampled(torch.tensor([0.0, 1.0]).log().expand(50, 3, 2))
    assert drawn.shape == (50, 3)
    assert bool((drawn == 1).all())
