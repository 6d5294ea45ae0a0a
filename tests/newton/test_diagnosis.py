import pytest

from lightning_sfn.newton.diagnosis import CurvatureError, explain

FINITE = "hvp='finite_difference'"


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
