import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import CurvatureError, HessianOperator, Objective, Spectrum, hessian_spectrum
from lightning_sfn.newton.spectrum import spectrum_of

from .cases import DTYPES, bits, frozen_probes, gauss_newton_reference, make, quadratic, reference, symmetric


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_full_spectrum_equals_numpy(dtype: torch.dtype) -> None:
    case = make("mlp_classifier", dtype)
    n = sum(p.numel() for p in case.parameters)
    spectrum = hessian_spectrum(case.closure, case.parameters, n)
    expected = np.linalg.eigvalsh(reference("mlp_classifier").hessian.numpy())
    bound = (1e-12 if dtype == torch.float64 else 2e-6) * np.abs(expected).max()
    assert np.abs(spectrum.eigenvalues.numpy() - expected).max() <= bound
    assert spectrum.loss == pytest.approx(reference("mlp_classifier").loss, rel=1e-6)
    assert spectrum.gradient_norm == pytest.approx(float(reference("mlp_classifier").gradient.norm()), rel=1e-5)
    assert spectrum.products == n


def test_dropout_is_frozen_and_the_global_stream_moves_by_one_evaluation() -> None:
    case = make("cnn_batchnorm_dropout")
    n = sum(p.numel() for p in case.parameters)
    frozen_probes(1, case)
    case.module(case.inputs)
    expected = torch.get_rng_state()
    frozen_probes(1, case)
    spectrum = hessian_spectrum(case.closure, case.parameters, n, hvp="recompute")
    assert torch.equal(torch.get_rng_state(), expected)
    values = np.linalg.eigvalsh(reference("cnn_batchnorm_dropout").hessian.numpy())
    assert np.abs(spectrum.eigenvalues.numpy() - values).max() <= 1e-10 * np.abs(values).max()


@pytest.mark.parametrize("krylov_dim", [1, 5, 12])
def test_every_interval_of_the_error_bounds_holds_an_eigenvalue(krylov_dim: int) -> None:
    matrix = symmetric(40)
    x = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    spectrum = hessian_spectrum(quadratic(matrix)(x), [x], krylov_dim)
    exact = torch.linalg.eigvalsh(matrix)
    distance = (spectrum.eigenvalues[:, None] - exact).abs().min(dim=1).values
    assert bool((distance <= spectrum.residuals + 1e-10).all())
    assert exact[0] <= spectrum.lambda_min <= spectrum.lambda_max <= exact[-1]
    assert spectrum.residual_max == max(spectrum.residuals[0], spectrum.residuals[-1])


def test_gauss_newton_spectra_are_not_negative() -> None:
    case = make("mlp")
    n = sum(p.numel() for p in case.parameters)
    spectrum = hessian_spectrum(case.pair, case.parameters, n, curvature="gauss_newton")
    expected = np.linalg.eigvalsh(gauss_newton_reference("mlp").numpy())
    assert np.abs(spectrum.eigenvalues.numpy() - expected).max() <= 1e-12 * expected.max()
    assert spectrum.negative_fraction == 0.0


@pytest.mark.parametrize("hvp", ["auto", "retain", "recompute", "finite_difference"])
def test_ways_to_compute_products_agree_and_change_no_parameter(hvp: str) -> None:
    case = make("mlp")
    before = bits(case.parameters)
    expected = hessian_spectrum(case.closure, case.parameters, 8).eigenvalues
    torch.testing.assert_close(
        hessian_spectrum(case.closure, case.parameters, 8, hvp=hvp).eigenvalues, expected, rtol=1e-6, atol=1e-8
    )
    assert bits(case.parameters) == before
    assert all(p.grad is None for p in case.parameters)


def test_the_seed_alone_decides_the_start_vector() -> None:
    case = make("mlp")

    def values(seed: int) -> list[float]:
        torch.randn(3)
        return hessian_spectrum(case.closure, case.parameters, 4, seed=seed).eigenvalues.tolist()

    assert values(3) == values(3)
    assert values(3) != values(4)


def test_the_index_counts_values_that_are_negative_beyond_rounding() -> None:
    values = torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 2.0], dtype=torch.float64)
    spectrum = Spectrum(values, torch.full((5,), 1e-8, dtype=torch.float64), 0.5, 0.25, 5)
    assert spectrum.negative_fraction == 0.2
    assert json.loads(json.dumps(spectrum.to_dict())) == {
        "eigenvalues": values.tolist(),
        "residuals": [1e-8] * 5,
        "lambda_min": -1.0,
        "lambda_max": 2.0,
        "negative_fraction": 0.2,
        "gradient_norm": 0.25,
        "loss": 0.5,
        "products": 5,
    }


def test_the_operator_is_closed_even_after_an_error() -> None:
    x = torch.randn(1, 1, 3, 4, requires_grad=True)

    def closure() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x).square().mean()

    operator = HessianOperator(Objective([closure]), [x], retention="retain")
    with pytest.raises(CurvatureError):
        spectrum_of(operator, 3)
    assert operator._graphs.retained == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"krylov_dim": 0}, ["krylov_dim is 0", "from 1 to 2"]),
        ({"krylov_dim": 3}, ["krylov_dim is 3", "from 1 to 2"]),
        ({"krylov_dim": -1}, ["krylov_dim is -1", "from 1 to 2"]),
        ({"krylov_dim": 2, "curvature": "hesian"}, ["curvature is 'hesian'", "'gauss_newton'"]),
        ({"krylov_dim": 2, "hvp": "jvp"}, ["hvp is 'jvp'", "'finite_difference'"]),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], words: list[str]) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as refusal:
        hessian_spectrum(lambda: (x**2).sum(), [x], **options)
    assert all(word in str(refusal.value) for word in words)


def test_finite_differences_of_gauss_newton_are_refused_as_in_the_optimizer() -> None:
    """They would give the Hessian under another name."""
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"finite_difference.*use curvature='hessian'"):
        hessian_spectrum(lambda: (x**2).sum(), [x], 2, curvature="gauss_newton", hvp="finite_difference")


def test_a_small_model_needs_no_krylov_dim() -> None:
    x = torch.zeros(2, requires_grad=True)
    spectrum = hessian_spectrum(lambda: 5 * x[0] ** 2 - x[1] ** 2, [x])
    torch.testing.assert_close(spectrum.eigenvalues, torch.tensor([-2.0, 10.0], dtype=torch.float64))
