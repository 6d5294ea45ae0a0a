"""What is measured, against independent computations."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paper_scale.recurrent import RecurrentTask, load_windows
from paper_scale.task import Task
from torch.nn import functional as F

from lightning_sfn.experiments.metrics import BitsPerCharacter, SquaredError


def test_errors_are_those_of_torchmetrics_and_torch(task: Task) -> None:
    problem = task.problem()
    squared_error, entropy = task.errors(problem.model, task.test)
    pixels = task.test.float() / 255
    metric = SquaredError()
    metric.update(problem.model(pixels), pixels)
    assert squared_error == pytest.approx(float(metric.compute()), rel=1e-6)
    with torch.no_grad():
        output = problem.model(pixels)
    by_torch = F.binary_cross_entropy(output.double(), pixels.double(), reduction="sum") / len(pixels)
    assert entropy == pytest.approx(float(by_torch), rel=1e-5)


def test_ends_of_the_spectrum_are_those_of_the_dense_hessian(task: Task) -> None:
    small = replace(task, settings=replace(task.settings, sizes=(49, 3, 2), probe_dim=60))
    problem = small.problem()
    row = small.measure(problem, spectrum=True)
    cases = task.train[: task.settings.probe_cases]
    parameters = list(problem.model.parameters())
    shapes = [p.shape for p in parameters]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = torch.split(flat, [shape.numel() for shape in shapes])
        names = [name for name, _ in problem.model.named_parameters()]
        values = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        output = torch.func.functional_call(problem.model.double(), values, (cases.double() / 255,))
        return F.binary_cross_entropy(output, cases.double() / 255, reduction="sum") / len(cases)

    point = torch.cat([p.detach().double().flatten() for p in parameters])
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, point))
    assert row["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-3)
    assert row["lambda_min"] == pytest.approx(float(values[0]), abs=2 * row["lambda_min_residual"] + 1e-4)


def test_gradient_norm_is_that_of_all_images(task: Task) -> None:
    problem = task.problem()
    row = task.measure(problem, spectrum=False)
    problem.loss(task.train).backward()
    norm = torch.cat([p.grad.flatten() for p in problem.model.parameters()]).norm()
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert "lambda_min" not in row


def test_every_problem_starts_from_the_same_point(task: Task) -> None:
    state = torch.get_rng_state()
    first, second = task.problem(), task.problem()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_too_few_images_are_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="There are 20 training images, but one mini-batch has 50"):
        Task.on(torch.device("cpu"), {"train": task.train[:20], "test": task.test}, task.settings)


def test_the_recurrent_network_is_measured_in_bits(tmp_path: Path, task: Task) -> None:
    (tmp_path / "a.train.txt").write_text("to be or not to be\n" * 40)
    (tmp_path / "a.test.txt").write_text("or not\n" * 30)
    windows = load_windows(str(tmp_path))
    assert windows["train"].shape == ((19 * 40 - 1) // 50, 51)
    assert torch.equal(windows["train"][1:, 0], windows["train"][:-1, -1])
    settings = replace(task.settings, task="recurrent", batch_size=4, part=4)
    recurrent = RecurrentTask.on(torch.device("cpu"), windows, settings)
    model = recurrent.problem().model
    bits = BitsPerCharacter()
    for window in recurrent.test:
        bits.update(model.loss(window.long().unsqueeze(0)) * 50, 50)
    assert recurrent.errors(model, recurrent.test)[0] == pytest.approx(float(bits.compute()), rel=1e-5)
