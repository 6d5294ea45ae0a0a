from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sfn.newton.sampled_targets import ElementwiseLosses

D = torch.float64
CASES = 200_000


def drawn(function: Callable[..., Tensor], prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Losses of single elements with drawn targets."""
    losses = ElementwiseLosses(torch.Generator().manual_seed(0))
    answer = losses.answer(function, (prediction, target), options)
    assert answer is not None
    (elements,) = losses.elements
    return elements


def dense_hessian(function: Callable[..., Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    single = prediction[:1].detach().clone()
    return torch.func.hessian(lambda p: function(p, target[:1], reduction="sum"))(single).squeeze()


@pytest.mark.parametrize(
    ("function", "prediction", "target"),
    [
        (F.mse_loss, torch.tensor([0.7], dtype=D), torch.zeros(1, dtype=D)),
        (F.binary_cross_entropy_with_logits, torch.tensor([0.4], dtype=D), torch.ones(1, dtype=D)),
        (F.cross_entropy, torch.tensor([0.5, -1.0, 0.2], dtype=D), torch.tensor([2])),
    ],
)
def test_squared_gradients_of_drawn_targets_are_the_hessian_on_average(
    function: Callable[..., Tensor], prediction: Tensor, target: Tensor
) -> None:
    many = prediction.expand(CASES, -1).clone().requires_grad_()
    targets = target.expand(CASES) if not target.is_floating_point() else target.expand(CASES, -1)
    (scores,) = torch.autograd.grad(drawn(function, many, targets).sum(), many)
    expected = dense_hessian(function, many, targets).reshape(len(prediction), -1)
    torch.testing.assert_close(scores.T @ scores / CASES, expected, atol=0.01, rtol=0.01)


def test_probabilities_and_log_probabilities_are_drawn_from_like_logits() -> None:
    logits = torch.tensor([0.5, -1.0, 0.2], dtype=D).expand(50, -1)
    classes = torch.zeros(50, dtype=torch.long)
    torch.testing.assert_close(
        drawn(F.nll_loss, logits.log_softmax(1), classes), drawn(F.cross_entropy, logits, classes)
    )
    binary = torch.tensor([0.3, -2.0], dtype=D).expand(50, -1)
    torch.testing.assert_close(
        drawn(F.binary_cross_entropy, binary.sigmoid(), binary.round().abs().clamp(max=1)),
        drawn(F.binary_cross_entropy_with_logits, binary, binary.round().abs().clamp(max=1)),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_true_one_with_the_gradient_of_drawn_targets(reduction: str) -> None:
    logits, target = torch.randn(6, 3, 4, dtype=D, requires_grad=True), torch.randint(3, (6, 4))
    target[0] = -100  # ignored
    losses = ElementwiseLosses(torch.Generator().manual_seed(0))
    answer = losses.answer(F.cross_entropy, (logits, target), {"reduction": reduction})
    (elements,) = losses.elements
    assert torch.equal(elements == 0, target == -100)
    assert answer is not None
    assert torch.equal(answer, F.cross_entropy(logits, target, reduction=reduction))
    whole = {"mean": elements.sum() / 20, "sum": elements.sum(), "none": elements}[reduction]
    (expected,) = torch.autograd.grad(whole.sum(), logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(answer.sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_losses_that_weight_their_elements_and_other_functions_are_left_alone() -> None:
    losses = ElementwiseLosses(torch.Generator())
    logits, target = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    assert losses.answer(F.cross_entropy, (logits, target), {"weight": torch.ones(3)}) is None
    binary = {"pos_weight": torch.ones(3)}
    assert losses.answer(F.binary_cross_entropy_with_logits, (logits, logits.sigmoid()), binary) is None
    assert losses.answer(F.mse_loss, (logits, logits), {"size_average": False}) is None
    assert losses.answer(F.mse_loss, (logits, logits), {"reduce": False}) is None
    assert losses.answer(F.l1_loss, (logits, logits), {}) is None
    assert not losses.elements


def test_the_squared_error_knows_its_prediction_by_its_graph() -> None:
    prediction, target = torch.randn(4, dtype=D, requires_grad=True), torch.randn(4, dtype=D)
    gradients = []
    for pair in ((prediction, target), (target, prediction)):
        losses = ElementwiseLosses(torch.Generator().manual_seed(0))
        answer = losses.answer(F.mse_loss, pair, {})
        assert answer is not None
        gradients.append(torch.autograd.grad(answer, prediction)[0])
    assert torch.equal(*gradients)


def test_targets_that_depend_on_parameters_are_not_drawn() -> None:
    first, second = (torch.randn(4, dtype=D, requires_grad=True) for _ in range(2))
    losses = ElementwiseLosses(torch.Generator())
    assert losses.answer(F.mse_loss, (first, second), {}) is None
    assert losses.answer(F.cross_entropy, (first, second.softmax(0)), {}) is None
    assert not losses.elements


def test_a_single_case_is_drawn_like_a_batch_of_one() -> None:
    logits, target = torch.tensor([0.5, -1.0, 0.2], dtype=D), torch.tensor(2)
    alone = drawn(F.cross_entropy, logits, target)
    torch.testing.assert_close(alone, drawn(F.cross_entropy, logits[None], target[None]).squeeze())


def test_drawn_targets_are_not_smoothed() -> None:
    logits, target = torch.randn(8, 3, dtype=D), torch.zeros(8, dtype=torch.long)
    smooth, sharp = (drawn(F.cross_entropy, logits, target, label_smoothing=share) for share in (0.5, 0.0))
    torch.testing.assert_close(smooth, sharp)


def test_probabilities_as_targets_are_replaced_by_drawn_classes() -> None:
    """They are no indices, so none of them is ignored."""
    logits = torch.randn(8, 3, dtype=D)
    soft = drawn(F.cross_entropy, logits, logits.softmax(1))
    torch.testing.assert_close(soft, drawn(F.cross_entropy, logits, torch.zeros(8, dtype=torch.long)))


@pytest.mark.parametrize("permuted", [False, True])
def test_the_generator_alone_decides_whatever_the_memory_layout(permuted: bool) -> None:
    prediction = torch.randn(4, 3, dtype=D)
    other = prediction.T.contiguous().T if permuted else prediction
    torch.randn(5)
    torch.testing.assert_close(
        drawn(F.mse_loss, prediction, prediction), drawn(F.mse_loss, other, prediction), rtol=0, atol=0
    )
