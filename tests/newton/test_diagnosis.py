from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton.diagnosis import CurvatureError, explain, require_double_backward

FINITE = "use hvp='finite_difference' (with curvature='hessian', which alone has it)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented",
            ["_scaled_dot_product_flash_attention_backward", "SDPBackend.MATH", FINITE],
        ),
        (
            "derivative for aten::_scaled_dot_product_efficient_attention_backward is not implemented",
            ["_scaled_dot_product_efficient_attention_backward", "SDPBackend.MATH", FINITE],
        ),
        (
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported for CuDNN "
            "RNNs due to limitations in the CuDNN API.\nTo run double backwards, please disable the CuDNN backend.",
            ["_cudnn_rnn_backward", "torch.backends.cudnn.flags(enabled=False)", FINITE],
        ),
        (
            "torch.compile with aot_autograd does not currently support double backward",
            ["torch.compile", "_orig_mod", FINITE],
        ),
        (
            "This backward function was compiled with non-empty donated buffers which requires create_graph=False",
            ["torch.compile", "_orig_mod", FINITE],
        ),
        (
            "When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad() or passing an `inputs` "
            "parameter to .backward().",
            ["checkpoint", "use_reentrant=False"],
        ),
        ("Checkpointing is not compatible with .grad() or when an `inputs` parameter", ["use_reentrant=False"]),
        (
            "trying to differentiate twice a function that was marked with @once_differentiable",
            ["once_differentiable", FINITE],
        ),
        ("WeightNormInterfaceBackward0", ["weight normalisation", "closure", FINITE]),
        ("derivative for aten::foo_backward is not implemented", ["aten::foo_backward", "replace it", FINITE]),
        (
            "one of the variables needed for gradient computation has been modified by an inplace operation: [x]\nhint",
            ["in place", "closure"],
        ),
        ("something new\nwith a second line", ["something new", "replace", FINITE]),
        ("", ["RuntimeError", FINITE]),
    ],
)
def test_autograd_errors_become_one_sentence_with_a_name_and_a_remedy(text: str, words: list[str]) -> None:
    error = explain(RuntimeError(text))
    assert isinstance(error, CurvatureError)
    assert "\n" not in str(error)
    assert str(error).endswith(".")
    assert all(word in str(error) for word in words), str(error)


def test_braces_in_an_error_do_no_harm() -> None:
    assert "{0} odd {name}" in str(explain(RuntimeError("{0} odd {name}")))


class Once(torch.autograd.Function):
    """Twice itself, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: Once.apply(x).sum(),
        lambda x: Once.apply(x).sin().sum() + x.cos().sum(),
        lambda x: x.cos().sum() + Once.apply(x).sin().sum(),
        lambda x: (x.cos() * x.sin() + Once.apply(x)).exp().sum(),
        lambda x: ((y := x.sin()) * y.cos() * Once.apply(y) * y).sum(),
    ],
    ids=["alone", "first", "last", "below", "shared"],
)
def test_a_function_without_second_derivative_is_found_on_any_branch(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CurvatureError, match=r"^An autograd\.Function of the model is marked once_differentiable, "):
        require_double_backward(loss(torch.ones(2, requires_grad=True)))


def test_a_graph_that_shares_its_nodes_is_walked_once() -> None:
    """Two to the power of two hundred paths lead through it."""
    x = torch.ones(2, requires_grad=True)
    y = x
    for _ in range(200):
        y = y * 0.5 + y * 0.5
    require_double_backward(y.sum())
