"""Room for the basis: refused before anything is spent, with the largest k that fits."""

import re
from pathlib import Path

import pytest
import torch
from paper_scale import memory
from paper_scale.memory import available_bytes, basis_bytes, require_room

CPU = torch.device("cpu")
N = 2_837_314


def test_the_papers_basis_takes_what_the_paper_scale_says() -> None:
    assert basis_bytes(N, 499, None) == pytest.approx(5.67e9, rel=1e-3)
    assert basis_bytes(N, 499, "bfloat16") == pytest.approx(2.84e9, rel=1e-3)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_k_that_is_named_fits_and_one_more_does_not(dtype: str | None) -> None:
    room = {"device": CPU, "basis_dtype": dtype, "graphs": 2**30, "available": 3 * 2**30}
    with pytest.raises(ValueError, match=r"GiB.*set krylov_dim to at most (\d+)") as refusal:
        require_room(N, 5000, **room)
    largest = int(re.findall(r"at most (\d+)", str(refusal.value))[0])
    require_room(N, largest, **room)
    with pytest.raises(ValueError, match="are left for it"):
        require_room(N, largest + 1, **room)
    if dtype is None:
        halved = int(re.findall(r"up to (\d+) with basis_dtype", str(refusal.value))[0])
        require_room(N, halved, **room | {"basis_dtype": "bfloat16"})
        assert halved > 1.9 * largest


def test_where_no_vector_fits_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"0\.00 GiB of 0\.09 GiB free on cpu.*another device"):
        require_room(N, 10, device=CPU, available=10**8)


def test_the_system_is_asked_for_what_its_caches_would_give_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:  3 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", told)
    assert available_bytes(CPU) == 3 * 1024
    with pytest.raises(ValueError, match="are left for it"):
        require_room(N, 10, device=CPU)


def test_nothing_is_refused_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "nowhere")
    assert available_bytes(CPU) is None
    require_room(N, 10**6, device=CPU)
