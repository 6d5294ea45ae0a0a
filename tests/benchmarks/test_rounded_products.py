"""What rounds products is right to the last bit, and the benchmark runs end to end on tiny tasks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import rounded_products
import torch
from rounded_products import Rounded


def nearest(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest float32 of so many bits, ties to even, by powers of two."""
    mantissa, exponent = np.frexp(values.double().numpy())
    return torch.from_numpy(np.ldexp(np.round(mantissa * 2.0 ** (bits + 1)), exponent - bits - 1)).float()


@pytest.mark.parametrize("bits", [10, 7])
def test_factors_are_rounded_to_the_nearest_and_sums_are_not(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(6, 6, generator=generator) for _ in range(3))
    a[0, 0] = 1 + 2.0 ** -(bits + 1)  # between two: the even one
    a[0, 1] = 1 + 3 * 2.0 ** -(bits + 1)
    assert nearest(a, bits)[0, :2].tolist() == [1.0, 1 + 2.0 ** (1 - bits)]
    image, kernel = torch.randn(1, 1, 6, 6, generator=generator), torch.randn(1, 1, 3, 3, generator=generator)
    expected = [
        nearest(a, bits) @ nearest(b, bits),
        torch.addmm(c, nearest(a, bits), nearest(b, bits)),
        torch.conv2d(nearest(image, bits), nearest(kernel, bits), c[0, :1]),
        a * b,
        (a.double() @ b.double()).float(),
    ]
    with Rounded(bits):
        got = [
            a @ b,
            torch.addmm(c, a, b),
            torch.conv2d(image, kernel, c[0, :1]),
            a * b,
            (a.double() @ b.double()).float(),
        ]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_everything_is_measured(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        path = rounded_products.main(["--quick", "--device", "cpu", "--folder", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    found = json.loads(path.read_text())
    assert len(found["spectra"]) == 9
    for row in found["spectra"]:
        if row["format"] == "float32":
            assert max(row["largest_errors"]) < 1e-5
            worst = row["smallest_errors"][0]
        else:
            assert row["smallest_errors"][0] > worst
    assert len(found["steps"]) == 4
    assert all(math.isfinite(row[name][0]) for row in found["steps"] for name in rounded_products.MANTISSA)
