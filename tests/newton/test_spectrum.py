import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import (
    CurvatureError,
    HessianOperator,
    Objective,
    ObjectiveError,
    Spectrum,
    hessian_spectrum,
    spectrum,
)
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.operators import ProductMethod, make_operator
from lightning_sfn.newton.processes import ProcessMean
from lightning_sfn.newton.spectrum import SpectrumSettings, spectrum_of

from .cases import (
    DTYPES,
    bits,
    frozen_probes,
    gauss_newton_reference,
    make,
    quadratic,
    reference,
    symmetric,
    with_spectrum,
)
from .ranks import Healthy


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
    spectrum = Spectrum(values, torch.full((5,), 1e-8, dtype=torch.float64), 0.5, 0.25, 5, rounding=1e-8)
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
        "converged": None,
        "nonfinite": 0,
        "size": 0,
        "rounding": 1e-8,
        "density": None,
    }


def test_a_spectrum_that_was_saved_without_its_rounding_claims_no_more_than_before() -> None:
    values = torch.tensor([-1e-9, 5.0], dtype=torch.float64)
    saved = Spectrum(values, torch.full((2,), 1e-6, dtype=torch.float64), 0.5, 0.25, 2, rounding=1e-6).to_dict()
    del saved["rounding"]
    assert not Spectrum.from_dict(saved).has_negative_curvature
    assert Spectrum.from_dict(saved).negative_fraction == 0


@pytest.mark.parametrize("hvp", ["auto", "recompute"])
def test_a_loss_that_changes_is_no_function_to_have_a_spectrum(hvp: ProductMethod) -> None:
    noise, x = torch.Generator().manual_seed(0), torch.ones(3, requires_grad=True)
    with pytest.raises(ObjectiveError, match="must be a fixed function"):
        hessian_spectrum(lambda: (x * x * torch.rand(3, generator=noise)).sum(), [x], hvp=hvp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_negative_ritz_value_is_negative_curvature_whatever_its_residual(dtype: torch.dtype) -> None:
    """Four vectors do not resolve one negative eigenvalue among a hundred, but bound it."""
    values = torch.cat([torch.tensor([-1.5]), torch.linspace(0, 10, 99)]).to(dtype)
    z = torch.zeros(100, dtype=dtype, requires_grad=True)
    spectrum = hessian_spectrum(lambda: (values * z * z).sum() / 2, [z], krylov_dim=4)
    assert -1.5 <= spectrum.lambda_min < 0 < spectrum.lambda_min + float(spectrum.residuals[0])
    assert spectrum.has_negative_curvature
    assert spectrum.negative_fraction == 0.25
    assert 0 < spectrum.rounding <= 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_of_finite_differences_count_their_error(dtype: torch.dtype) -> None:
    case = make("mlp", dtype)
    found = hessian_spectrum(case.closure, case.parameters, hvp="finite_difference")
    exact = torch.linalg.eigvalsh(reference("mlp").hessian)
    for value, bound in zip(found.eigenvalues, found.residuals, strict=True):
        assert float((exact - value).abs().min()) <= float(bound)
    assert float(found.residuals.max()) <= 1e-3 * float(exact.abs().max())


def test_the_operator_is_closed_even_after_an_error() -> None:
    x = torch.randn(1, 1, 3, 4, requires_grad=True)

    def closure() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x).square().mean()

    operator = HessianOperator(Objective([closure]), [x], retention="retain")
    with pytest.raises(CurvatureError):
        spectrum_of(operator, SpectrumSettings(3))
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "mlp_classifier", "cnn_batchnorm_dropout", "rnn", "lstm", "transformer"])
def test_both_ends_of_a_model_are_those_of_the_dense_hessian(name: str, dtype: torch.dtype) -> None:
    case = make(name, dtype)
    frozen_probes(1, case)
    spectrum = hessian_spectrum(case.closure, case.parameters, 12, smallest=2, largest=3, tol=1e-3, max_products=400)
    exact = torch.from_numpy(np.linalg.eigvalsh(reference(name).hessian.numpy()))
    assert spectrum.converged
    assert 12 <= spectrum.products < 400
    noise = (1e-12 if dtype == torch.float64 else 1e-5) * float(exact.abs().max())
    for end in (slice(2), slice(-3, None)):
        assert bool(((spectrum.eigenvalues[end] - exact[end]).abs() <= 1e-3 * exact[end].abs() + noise).all())
    distance = (spectrum.eigenvalues[:, None] - exact).abs().min(dim=1).values
    assert bool((distance <= spectrum.residuals + noise).all())


def spectrum_with(values: list[float], **options: Any) -> Spectrum:
    """The spectrum of a quadratic whose Hessian has these eigenvalues."""
    x = torch.zeros(len(values), dtype=torch.float64, requires_grad=True)
    return hessian_spectrum(quadratic(with_spectrum(torch.tensor(values, dtype=torch.float64)))(x), [x], **options)


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([1000.0, *torch.linspace(-0.3, 1.0, 99).tolist()], (-0.3, 1000.0)),
        ([3.0, 2.999, 2.998, *torch.linspace(-1.0, 1.0, 97).tolist()], (-1.0, 3.0)),
        ([4.0, -2.0, 1.0, *[0.0] * 97], (-2.0, 4.0)),
        ([-2.0, 1.0], (-2.0, 1.0)),
        ([0.0] * 20, (0.0, 0.0)),
    ],
    ids=["dominated", "clustered", "rank deficient", "saddle", "zero"],
)
def test_known_spectra_converge(values: list[float], ends: tuple[float, float]) -> None:
    spectrum = spectrum_with(values, krylov_dim=min(10, len(values)), tol=1e-6, max_products=500)
    assert spectrum.converged
    assert (spectrum.lambda_min, spectrum.lambda_max) == pytest.approx(ends, rel=1e-5, abs=1e-12)
    assert spectrum.size == len(values)


@pytest.mark.parametrize(
    ("options", "converged", "products"),
    [
        ({}, None, 8),
        ({"max_products": 50}, None, 8),  # a budget without a tolerance is not used
        ({"tol": 0.9}, True, 8),
        ({"tol": 1e-9}, False, 32),
        ({"tol": 1e-9, "max_products": 8}, False, 8),
        ({"tol": 1e-9, "max_products": 21}, False, 21),
        ({"tol": 1e-9, "smallest": 0, "largest": 0}, True, 8),
        ({"tol": 1e-9, "max_products": 21, "density_probes": 2}, False, 37),
    ],
)
def test_the_budget_is_kept_and_told(options: dict[str, Any], converged: bool | None, products: int) -> None:
    spectrum = spectrum_with(torch.linspace(-1.0, 1.0, 200).tolist(), krylov_dim=8, **options)
    assert spectrum.converged is converged
    assert spectrum.products == products


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 6),
        ({"tol": 1e-2}, 24),
        ({"tol": 1e-12, "max_products": 31}, 31),
        ({"density_probes": 3}, 24),
        ({"tol": 1e-2, "density_probes": 2, "max_products": 40}, 52),
    ],
)
def test_progress_counts_every_product_up_to_the_most_there_can_be(options: dict[str, Any], most: int) -> None:
    calls: list[tuple[int, int]] = []
    spectrum = spectrum_with(
        torch.linspace(-1.0, 1.0, 60).tolist(), krylov_dim=6, progress=lambda *call: calls.append(call), **options
    )
    assert calls == [(number, most) for number in range(1, spectrum.products + 1)]
    assert spectrum.products <= most


@pytest.mark.parametrize("smallest", [0, 1, 3, 9])
@pytest.mark.parametrize("largest", [0, 2, 9])
def test_extremes_are_named_from_the_outside(smallest: int, largest: int) -> None:
    values = [-3.0, -1.0, 0.5, 2.0, 7.0]
    spectrum = spectrum_with(values)
    names = [name for name, _, _ in spectrum.extremes(smallest, largest)]
    low = [f"smallest_{i:02d}" for i in range(min(smallest, 5))]
    assert names == low + [f"largest_{i:02d}" for i in range(min(largest, 5))]
    expected = values[:smallest] + values[::-1][:largest]
    assert [value for _, value, _ in spectrum.extremes(smallest, largest)] == pytest.approx(expected)
    bounds = spectrum.residuals.tolist()
    expected = bounds[:smallest] + bounds[::-1][:largest]
    assert [bound for _, _, bound in spectrum.extremes(smallest, largest)] == expected


def test_bounds_belong_to_their_values() -> None:
    values, bounds = torch.tensor([[-3.0, -1.0, 2.0], [0.1, 0.2, 0.3]], dtype=torch.float64)
    assert Spectrum(values, bounds, 0.0, 0.0, 3).extremes(2, 2) == [
        ("smallest_00", -3.0, 0.1),
        ("smallest_01", -1.0, 0.2),
        ("largest_00", 2.0, 0.3),
        ("largest_01", -1.0, 0.2),
    ]


@pytest.mark.parametrize(
    ("options", "settings", "names", "seed"),
    [
        ({}, SpectrumSettings(64, 1, 1, None, None, 0), ("hessian", "auto"), 0),
        (
            {
                "smallest": 2,
                "largest": 3,
                "tol": 0.5,
                "max_products": 99,
                "density_probes": 4,
                "seed": 5,
                "hvp": "retain",
            },
            SpectrumSettings(64, 2, 3, 0.5, 99, 4),
            ("hessian", "retain"),
            5,
        ),
        (
            {"krylov_dim": 1, "curvature": "gauss_newton", "hvp": "retain"},
            SpectrumSettings(1),
            ("gauss_newton", "retain"),
            0,
        ),
        ({"krylov_dim": 70}, SpectrumSettings(70), ("hessian", "auto"), 0),
    ],
)
def test_what_is_asked_for_is_handed_on(
    options: dict[str, Any], settings: SpectrumSettings, names: tuple[str, str], seed: int
) -> None:
    x, progress = torch.zeros(70, requires_grad=True), mock.Mock()
    with (
        mock.patch.object(spectrum, "spectrum_of") as taken,
        mock.patch.object(spectrum, "make_operator", side_effect=make_operator) as made,
    ):
        given = hessian_spectrum(lambda: (x**2).sum(), [x], progress=progress, **options)
    assert given is taken.return_value
    assert taken.call_args.args[1] == settings
    assert taken.call_args.kwargs == {"seed": seed, "progress": progress}
    assert made.call_args.args[2:] == names


def test_a_loss_of_other_parameters_is_told_from_a_flat_one() -> None:
    x, other = (torch.zeros(2, requires_grad=True) for _ in range(2))
    words = r"^The loss depends on none of the parameters: give those of the model that it comes from\.$"
    with pytest.raises(ObjectiveError, match=words):
        hessian_spectrum(lambda: (other**2).sum(), [x])
    for flat in (lambda: (x**4).sum(), lambda: (x**4).sum() + (other**2).sum(), lambda: (0 * x).sum()):
        assert hessian_spectrum(flat, [x, torch.zeros(1, requires_grad=True)]).eigenvalues.tolist() == [0, 0, 0]
    curved = hessian_spectrum(lambda: x.sum() + (x**2).sum(), [x])
    assert curved.eigenvalues.tolist() == pytest.approx([2, 2])
    assert hessian_spectrum(lambda: 3 * x.sum(), [x]).gradient_norm == pytest.approx(3 * 2**0.5)


@pytest.mark.parametrize("seed", [None, 0])
def test_global_random_numbers_are_left_alone_even_where_a_space_is_exhausted(seed: int | None) -> None:
    before = torch.get_rng_state()
    x = torch.zeros(6, requires_grad=True)
    options = {} if seed is None else {"seed": seed}
    operator = HessianOperator(Objective([lambda: (x**2).sum()]), [x])
    given = spectrum_of(operator, SpectrumSettings(6, tol=1e-3, density_probes=2), **options)
    assert given.eigenvalues.tolist() == pytest.approx([2.0] * 6)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_spectrum_of_random_vectors_begins_with_those_of_seed_zero() -> None:
    case = make("mlp")
    operators = [HessianOperator(Objective([case.closure]), case.parameters) for _ in range(2)]
    by_default, named = (
        spectrum_of(operators[0], SpectrumSettings(3)),
        spectrum_of(operators[1], SpectrumSettings(3), seed=0),
    )
    assert torch.equal(by_default.eigenvalues, named.eigenvalues)


def test_products_are_put_where_there_is_room() -> None:
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(Objective([quadratic(symmetric(6))(x)]), [x])
    with mock.patch.object(operator, "matvec_into", side_effect=operator.matvec_into) as into:
        spectrum_of(operator, SpectrumSettings(4))
    rooms = [call.args[1] for call in into.call_args_list]
    assert {(room.shape, room.dtype) for room in rooms} == {((6,), torch.float64)}
    assert len({room.data_ptr() for room in rooms}) == 1


@pytest.mark.parametrize("error", [None, KeyError("boom")])
def test_of_several_processes_a_failed_product_is_an_error_and_one_that_is_not_finite_a_number(
    error: Exception | None,
) -> None:
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    class Poisoned(HessianOperator):
        def _matvec(self, vector: Tensor) -> Tensor:
            if error is not None:
                raise error
            return super()._matvec(vector) * math.nan

    operator = Poisoned(Objective([lambda: (x**2).sum() + x.sum()], reduce=ProcessMean(Healthy())), [x])
    if error is None:
        assert spectrum_of(operator, SpectrumSettings(3)).nonfinite == 5
    else:
        with pytest.raises(KeyError, match="boom"):
            spectrum_of(operator, SpectrumSettings(3))


def poisoned(x: Tensor, place: str) -> Tensor:
    """A loss of which one derivative is not finite at zero."""
    if place == "loss":
        return x.square().sum() + math.inf
    if place == "gradient":
        return x.square().sum() + x[0].abs().sqrt()
    return x.square().sum() + x[0].abs() ** 1.5  # its second derivative is infinite


@pytest.mark.parametrize("density_probes", [0, 2])
@pytest.mark.parametrize(("place", "count"), [("loss", 1), ("gradient", 1), ("product", 1)])
def test_numbers_that_are_not_finite_are_counted_and_nothing_is_raised(
    place: str, count: int, density_probes: int
) -> None:
    x = torch.zeros(5, requires_grad=True)
    options: dict[str, Any] = {"tol": 1e-3, "density_probes": density_probes}
    spectrum = hessian_spectrum(lambda: poisoned(x, place), [x], 4, **options)
    assert spectrum.nonfinite == count
    assert spectrum.products == (1 if place == "product" else 0)
    assert len(spectrum.eigenvalues) == len(spectrum.residuals) == 0
    assert spectrum.density is None
    assert spectrum.converged is False
    assert all(math.isnan(v) for v in (spectrum.lambda_min, spectrum.lambda_max, spectrum.residual_max))
    assert math.isnan(spectrum.negative_fraction)
    assert spectrum.extremes(3, 3) == []
    assert "nan" in str(spectrum)


class Failing(HessianOperator):
    """Its products are not finite from the given one on."""

    fails_at = 0

    def _matvec(self, vector: Tensor) -> Tensor:
        image = super()._matvec(vector)
        if self.products >= self.fails_at:
            image[:3] = math.nan
        return image


@pytest.mark.parametrize(("fails_at", "known"), [(4, 3), (9, 8), (20, 8), (30, 8)])
def test_what_was_known_before_is_kept(fails_at: int, known: int) -> None:
    """Products up to 24 are for the eigenvalues, later ones for the density."""
    x = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    operator = Failing(Objective([quadratic(symmetric(50))(x)]), [x])
    operator.fails_at = fails_at
    spectrum = spectrum_of(operator, SpectrumSettings(8, tol=1e-14, max_products=24, density_probes=3))
    assert spectrum.nonfinite == 3  # of the first such product
    assert len(spectrum.eigenvalues) == known
    assert not spectrum.converged
    assert spectrum.density is None
    exact = torch.linalg.eigvalsh(symmetric(50))
    distance = (spectrum.eigenvalues[:, None] - exact).abs().min(dim=1).values
    assert bool((distance <= spectrum.residuals + 1e-12).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"krylov_dim": 0}, "krylov_dim is 0, but a whole number of at least 1"),
        ({"krylov_dim": 2.0}, "krylov_dim is 2.0, but a whole number"),
        ({"krylov_dim": True}, "krylov_dim is True, but a whole number"),
        ({"krylov_dim": None}, "krylov_dim is None, but a whole number"),
        ({"smallest": -1}, "smallest is -1, but a whole number of at least 0"),
        ({"smallest": None}, "smallest is None, but a whole number"),
        ({"largest": "3"}, "largest is '3', but a whole number"),
        ({"max_products": 63}, "max_products is 63, but a whole number of at least 64"),
        ({"density_probes": -2}, "density_probes is -2, but a whole number of at least 0"),
        ({"tol": 0.0}, "tol is 0.0, but a number between 0 and 1"),
        ({"tol": 1.0}, "tol is 1.0, but a number between 0 and 1"),
        ({"tol": -0.1}, "tol is -0.1, but a number between 0 and 1"),
        ({"tol": math.nan}, "tol is nan, but a number between 0 and 1"),
        ({"tol": "1e-3"}, "tol is '1e-3', but a number between 0 and 1"),
        ({"tol": True}, "tol is True, but a number between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as refusal:
        SpectrumSettings(**options)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "ritz_products", "products"),
    [
        ({}, 64, 64),
        ({"tol": 1e-3}, 256, 256),
        ({"tol": 1e-3, "max_products": 100}, 100, 100),
        ({"krylov_dim": 8, "density_probes": 3}, 8, 32),
        ({"krylov_dim": 2000, "density_probes": 1}, 1000, 2000),
        ({"krylov_dim": 2000, "tol": 0.5}, 4000, 4000),
    ],
)
def test_the_most_products_follow_from_the_settings(options: dict[str, Any], ritz_products: int, products: int) -> None:
    settings = SpectrumSettings(**options)
    assert (settings.most_ritz_products(1000), settings.most_products(1000)) == (ritz_products, products)


SAVED = {
    "plain": Spectrum(torch.tensor([-1.0, 2.0]).double(), torch.tensor([0.1, 0.2]).double(), 0.5, 0.25, 7, size=9),
    "empty": Spectrum(torch.empty(0).double(), torch.empty(0).double(), math.nan, math.inf, 1, False, 4),
}


@pytest.mark.parametrize("name", ["plain", "empty", "density"])
def test_a_spectrum_survives_its_file(name: str, tmp_path: Path) -> None:
    spectrum = spectrum_with([-2.0, 0.0, 1.0, 5.0], tol=1e-3, density_probes=2) if name == "density" else SAVED[name]
    path = tmp_path / "new" / "folder" / "spectrum.json"
    spectrum.save(path, checkpoint="last.ckpt", verdict="saddle: ...", lambda_min="a note does not replace a number")
    again = Spectrum.load(str(path))
    assert again.to_dict().keys() == spectrum.to_dict().keys()
    assert str(again.to_dict()) == str(spectrum.to_dict())  # NaN is not equal to itself, but its name is
    assert again.eigenvalues.dtype == again.residuals.dtype == torch.float64
    assert (again.density is None) == (name != "density")
    entries = json.loads(path.read_text())
    assert entries["checkpoint"] == "last.ckpt"
    assert str(entries["lambda_min"]) == str(spectrum.lambda_min)


def test_saving_replaces_a_file_only_once_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "spectrum.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        SAVED["plain"].save(path, note=object())
    assert path.read_text() == "old"
    SAVED["plain"].save(path)
    assert Spectrum.load(path).loss == 0.5
    assert [file.name for file in tmp_path.glob("spectrum*")] == ["spectrum.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "3",
        "null",
        '"eigenvalues"',
        "{}",
        '{"eigenvalues": [1.0], "residuals": [0.1]}',
        '{"eigenvalues": null, "residuals": [], "loss": 0, "gradient_norm": 0, "products": 0}',
        '{"eigenvalues": {}, "residuals": {}, "loss": 0, "gradient_norm": 0, "products": 0}',
        '{"eigenvalues": ["a"], "residuals": [0], "loss": 0, "gradient_norm": 0, "products": 0}',
        '{"eigenvalues": [], "residuals": [], "loss": 0, "gradient_norm": 0, "products": 0, "density": {}}',
        '{"eigenvalues": [], "residuals": [], "loss": 0, "gradient_norm": 0, "products": 0, "density": [1]}',
        '{"eigenvalues": [1, 2], "residuals": [0.1], "loss": 0, "gradient_norm": 0, "products": 0}',
    ],
)
def test_a_file_that_holds_no_spectrum_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^\S+other\.json does not hold a spectrum: [^\n]+\.$"):
        Spectrum.load(path)


def test_entries_that_do_not_fit_together_are_told() -> None:
    entries = SAVED["plain"].to_dict() | {"residuals": [0.1]}
    with pytest.raises(ValueError, match=r"^There are not as many residuals as eigenvalues\.$"):
        Spectrum.from_dict(entries)


def test_a_binary_file_is_no_spectrum(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"last\.ckpt does not hold a spectrum"):
        Spectrum.load(tmp_path / "last.ckpt")


def test_named_parameters_are_parameters() -> None:
    torch.manual_seed(0)
    net, x = torch.nn.Linear(3, 1).double(), torch.randn(5, 3, dtype=torch.float64)
    named, unnamed = (
        hessian_spectrum(lambda: net(x).square().mean(), given).eigenvalues
        for given in (net.named_parameters(), net.parameters())
    )
    assert torch.equal(named, unnamed)
    with pytest.raises(ValueError, match="given as a module"):
        hessian_spectrum(lambda: net(x).square().mean(), net)  # type: ignore[arg-type]


def test_all_of_a_spectrum() -> None:
    case = make("mlp")
    whole = hessian_spectrum(case.closure, case.parameters, "full")
    expected = np.linalg.eigvalsh(reference("mlp").hessian.numpy())
    assert len(whole.eigenvalues) == len(expected)
    np.testing.assert_allclose(whole.eigenvalues.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("krylov_dim", ["all", True, 2.5, 0])
def test_what_is_no_size_of_a_spectrum_is_refused(krylov_dim: Any) -> None:
    words = rf"^krylov_dim is {krylov_dim!r}, but a number from 1 to 2 \(all parameters\) is expected\.$"
    with pytest.raises(ValueError, match=words):
        hessian_spectrum(lambda: torch.zeros(()), [torch.ones(2, requires_grad=True)], krylov_dim)


def test_a_spectrum_takes_numbers_of_numpy_and_no_seed_that_is_none() -> None:
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    closure = lambda: (x**4).sum()  # noqa: E731
    asked: Any = {"krylov_dim": np.int64(2), "seed": np.int64(1), "tol": np.float32(0.5), "smallest": np.int32(1)}
    found = hessian_spectrum(closure, [x], **asked)
    assert found.lambda_max == pytest.approx(12.0)
    json.dumps(found.to_dict())
    with pytest.raises(ValueError, match=r"^seed is None"):
        hessian_spectrum(closure, [x], seed=None)  # type: ignore[arg-type]


def test_the_default_device_is_the_models_affair() -> None:
    """What is made beside the parameters says where it lies."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)), torch.randn(9, 3)

    def spectrum() -> Spectrum:
        closure = lambda: model(x).square().mean()  # noqa: E731
        return hessian_spectrum(closure, model.parameters(), 12, density_probes=2, tol=1e-3)

    plain = spectrum()
    with torch.device("meta"):
        elsewhere = spectrum()
        again = Spectrum.from_dict(elsewhere.to_dict())
        dense = dense_matrix(HessianOperator(Objective([lambda: model(x).square().mean()]), model.parameters()))
    assert elsewhere.to_dict() == plain.to_dict() == again.to_dict()
    assert torch.linalg.eigvalsh(dense)[-1] == pytest.approx(plain.lambda_max, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("seed", range(4))
def test_error_bounds_hold_where_the_krylov_space_is_almost_invariant(seed: int, scale: float) -> None:
    """Factors of a matrix near zero: few eigenvalues, each several times; rounding decides what comes after them."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(30, 3, generator=draw) @ torch.randn(3, 20, generator=draw)
    left, right = scale * torch.randn(30, 3, generator=draw), scale * torch.randn(3, 20, generator=draw)

    def loss(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v - matrix.to(u.dtype)).square().mean()

    parameters = [left.requires_grad_(), right.requires_grad_()]
    spectrum = hessian_spectrum(lambda: loss(*parameters), parameters, 64, seed=seed)
    flat = torch.cat([p.detach().double().flatten() for p in parameters])
    dense = torch.autograd.functional.hessian(lambda w: loss(w[:90].view(30, 3), w[90:].view(3, 20)), flat)
    exact = torch.linalg.eigvalsh(dense)
    nearest = (spectrum.eigenvalues[:, None] - exact).abs().amin(1)
    assert bool((nearest <= spectrum.residuals).all())
