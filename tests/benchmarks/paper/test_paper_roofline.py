"""The roofline: operations that are counted, shares that add up, and a basis in bfloat16 that is a little off."""

from pathlib import Path

import pytest
import torch
from paper_scale.roofline import Part, bfloat16_error, layer_sizes, write_roofline
from paper_scale.task import Task
from torch.utils.flop_counter import FlopCounterMode


def test_a_part_is_held_against_the_tighter_bound() -> None:
    part = Part("x", 4.0, 200.0, 30.0, {})
    assert part.against(100.0, 30.0)["limit"] == "matrix rate"
    assert part.against(100.0, 30.0)["share_of_roofline"] == pytest.approx(0.5)
    assert part.against(100.0, 10.0)["limit"] == "bandwidth"
    assert part.against(100.0, 10.0)["bound_seconds"] == pytest.approx(3.0)


def test_parts_of_a_step(task: Task, tmp_path: Path) -> None:
    found = write_roofline(task, tmp_path / "roofline.json")
    rows = {row["part"]: row for row in found["parts"]}
    for name in ("sfn", "sfn_paper"):
        assert sum(row[f"share_of_{name}"] for row in found["parts"]) == pytest.approx(1.0)
    problem = task.problem()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(problem.loss(task.train), list(problem.model.parameters()))
    assert rows["gradient on all images"]["flops"] == pytest.approx(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        problem.loss(task.train)
    assert rows["trial loss on all images"]["flops"] == pytest.approx(counter.get_total_flops())
    weights = sum(a * b for a, b in layer_sizes(task.settings))
    first = 49 * 16
    model = (12 * weights - 8 * first) * len(task.train)  # docs/many_devices.md
    assert rows["product on all images"]["flops"] == pytest.approx(model, rel=0.1)


def test_bfloat16_is_off_by_little_but_by_something(task: Task) -> None:
    found = bfloat16_error(task)
    assert 0 < found["ritz_error"] < 1e-2
    assert 0 < found["step_error"] < 0.1
