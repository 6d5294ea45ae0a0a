"""The engine's benchmark end to end on tiny networks, and what it measures that is no matter of time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine_parts import basis, growth, memory, networks, products
from engine_parts.tables import TABLES
from engine_parts.timing import Clock

from lightning_sfn.newton import HessianOperator, Objective

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(content: Any) -> Iterator[float]:
    if isinstance(content, dict):
        content = list(content.values())
    for item in content if isinstance(content, list) else []:
        yield from numbers(item)
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        yield content


def test_everything_is_measured_and_a_part_can_be_measured_again(tmp_path: Path) -> None:
    path = engine.main(["--quick", "--device", "cpu", "--folder", str(tmp_path)])
    first = json.loads(path.read_text())
    assert {"conditions", "settings", "measured", *engine.PARTS} == first.keys()
    assert first["measured"].keys() == engine.PARTS.keys()
    assert all(math.isfinite(number) for number in numbers({part: first[part] for part in engine.PARTS}))
    assert all(abs(sum(row["shares"].values()) - 1) < 1e-4 for row in first["steps"])
    assert all(row["steps"] > 0 for row in first["steps"])
    assert first["spectrum"]["rows"][-1]["worst_error"] < 1e-2
    for part, table in TABLES.items():
        header, lines = table(first[part])
        assert lines
        assert all(len(line) == len(header) for line in lines)
    again = json.loads(
        engine.main(["--quick", "--device", "cpu", "--folder", str(tmp_path), "--only", "memory"]).read_text()
    )
    assert again["spectrum"] == first["spectrum"]
    assert again["measured"]["spectrum"] == first["measured"]["spectrum"]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="before torch 2.13 graphs keep the values of their gradient")
def test_kept_graphs_keep_to_their_budget() -> None:
    """By the allocator's books, not by the budget's own."""
    rows = memory.measure(CPU, quick=True)
    assert [row["kept_graphs"] for row in rows] == 3 * [10, 5, 0]
    for row in rows:
        assert row["held_bytes"] <= row["budget_bytes"]


def test_waits_do_not_grow_with_the_basis() -> None:
    assert len({basis.waits(CPU, dim) for dim in (8, 32, 128)}) == 1


def test_a_copy_from_another_device_is_a_wait() -> None:
    with basis.Waits() as counter:
        torch.ones(3).double()
        torch.ones(3).to("meta")
    assert counter.count == 0
    assert basis._leaves((torch.ones(3, device="meta"),), torch.ones(3))
    assert not basis._leaves((torch.ones(3),), torch.ones(3))


def test_allocations_are_those_of_the_allocator() -> None:
    kept: list[torch.Tensor] = []

    def work() -> None:
        torch.empty(3000).fill_(1)
        kept.append(torch.ones(1000))

    held, peak = memory.allocations(work, CPU)
    assert held == pytest.approx(4000, abs=200)
    assert peak == pytest.approx(12_000, abs=400)


def test_a_clock_counts_the_inner_part_alone() -> None:
    clock = Clock(iter([0.0, 1.0, 3.0, 6.0, 10.0]).__next__)
    with clock.part("outer"), clock.part("inner"):
        pass
    assert dict(clock.seconds) == {"outer": 6.0, "inner": 3.0}


def test_a_product_derived_anew_is_the_operators() -> None:
    for case in networks.cases(CPU, quick=True):
        operator = HessianOperator(Objective(case.closures), case.parameters)
        vector = torch.randn(operator.parameters.size)
        found = products.one_graph(case, vector)
        assert found is not None
        found[0]()
        torch.testing.assert_close(found[1], operator.matvec(vector), rtol=1e-3, atol=1e-6)
        operator.close()


def test_exponents_are_slopes_of_logarithms() -> None:
    found = growth._fitted("a", "b", 2, {str(n): 3e-3 * n**2 for n in (10, 20, 40, 80)})
    assert found["exponent"] == pytest.approx(2)
    assert found["exponent_of_upper_half"] == pytest.approx(2)


def test_the_recurrent_cell_and_its_reference_are_one_function() -> None:
    case = networks.recurrent_cell(CPU, quick=True)
    assert case.reference is not None
    torch.testing.assert_close(case.closures[0](), case.reference())
