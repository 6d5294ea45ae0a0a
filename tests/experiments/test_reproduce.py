"""The paper's figures: the runner, its refusals, tiny runs of each figure, and the oracles under them."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from scipy import stats

from lightning_sfn import cli
from lightning_sfn.experiments import figure1, figure3_runs, figure4, figure4_autoencoder, figure4_recurrent, plateau
from lightning_sfn.experiments.classified import HUB_IDS
from lightning_sfn.experiments.critical_points import find_critical_point
from lightning_sfn.experiments.eigendirections import METHODS, closed_form, steps_along_eigenvectors
from lightning_sfn.experiments.figure import Sources, judge
from lightning_sfn.experiments.figure2 import Settings, trajectory
from lightning_sfn.experiments.figure4_autoencoder import momentum_schedule
from lightning_sfn.experiments.reproduce import _whole, find_figure, main, reproduce
from lightning_sfn.experiments.runner import Job, Runner
from lightning_sfn.experiments.statistics import mean_interval, rank_correlation
from lightning_sfn.newton import FlatParameters, SaddleFreeNewton

SAMPLES = Sources("sample", None, "sample")
CALLS: list[int] = []


def square(number: int) -> dict[str, Any]:
    CALLS.append(number)
    if number < 0:
        raise KeyboardInterrupt
    return {"square": number**2}


def jobs(*numbers: int) -> list[Job]:
    return [Job(f"job{n}", square, {"number": n}) for n in numbers]


def runner(folder: Path, settings: object = 1, **options: Any) -> Runner:
    return Runner(folder, {"settings": settings}, progress=False, **options)


def test_an_interrupted_run_goes_on(empty_folder: Path) -> None:
    CALLS.clear()
    with pytest.raises(KeyboardInterrupt):
        runner(empty_folder).run(jobs(1, 2, -1, 3), "")
    (empty_folder / "jobs" / ".job3.json.7").write_text('{"square": 1')  # half-written by a killed process
    (empty_folder / "jobs" / "job2.json").write_text('{"squ')  # damaged
    results = runner(empty_folder).run(jobs(1, 2, 3), "")
    assert [r["square"] for r in results.values()] == [1, 4, 9]
    assert CALLS == [1, 2, -1, 2, 3]


def test_another_runs_folder_is_refused(empty_folder: Path) -> None:
    runner(empty_folder, {"k": 1}).run(jobs(1), "")
    with pytest.raises(MisconfigurationException, match=r"other settings \(k is 1 there and 2 here\).*--overwrite"):
        runner(empty_folder, {"k": 2})
    CALLS.clear()
    runner(empty_folder, {"k": 2}, overwrite=True).run(jobs(1), "")
    assert CALLS == [1]
    runner(empty_folder, {"k": 2}).run(jobs(1), "")
    assert CALLS == [1]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("settings", [None, "{}", "[1]", "not JSON", '{"editor": 4}'])
def test_a_folder_of_foreign_files_is_refused_and_left_alone(
    empty_folder: Path, settings: str | None, overwrite: bool
) -> None:
    (empty_folder / "jobs").mkdir()
    (empty_folder / "jobs" / "mine.json").write_text("{}")
    if settings is not None:
        (empty_folder / "settings.json").write_text(settings)
    before = sorted(path.name for path in empty_folder.rglob("*"))
    with pytest.raises(MisconfigurationException, match="without the settings of a run"):
        runner(empty_folder, overwrite=overwrite)
    assert sorted(path.name for path in empty_folder.rglob("*")) == before


def test_overwriting_deletes_what_the_earlier_run_left_and_nothing_else(empty_folder: Path) -> None:
    old, new = {"figure": "fig2", "settings": 1}, {"figure": "fig3", "settings": 1}
    Runner(empty_folder, old, progress=False).run(jobs(1), "")
    for name in ("fig2.json", "fig2_methods.png", "fig2.txt", "fig22.png", "fig1.json", "notes.pdf"):
        (empty_folder / name).write_text("")
    Runner(empty_folder, new, overwrite=True, progress=False)
    left = {path.name for path in empty_folder.iterdir()}
    assert left == {"settings.json", "jobs", "fig2.txt", "fig22.png", "fig1.json", "notes.pdf"}
    assert not list((empty_folder / "jobs").iterdir())


def test_a_run_of_another_version_is_refused(empty_folder: Path) -> None:
    folder = empty_folder / "run"
    Runner(folder, {"settings": 1, "lightning_sfn": "0.1", "torch": "2.6"}, progress=False)
    with pytest.raises(MisconfigurationException, match=r"under another version \(torch 2.6 there and 2.7 here\)"):
        Runner(folder, {"settings": 1, "lightning_sfn": "0.1", "torch": "2.7"}, progress=False)
    with pytest.raises(MisconfigurationException, match=r"settings is 1 there and 2 here"):
        Runner(folder, {"settings": 2, "lightning_sfn": "0.1", "torch": "2.7"}, progress=False)
    (folder / "settings.json").write_text('{"settings": 1}')  # as earlier versions wrote it
    with pytest.raises(MisconfigurationException, match=r"lightning_sfn unknown there and 0.1 here"):
        Runner(folder, {"settings": 1, "lightning_sfn": "0.1", "torch": "2.7"}, progress=False)


def test_jobs_in_processes_of_their_own(empty_folder: Path) -> None:
    arguments = {"surface": "saddle", "settings": Settings(steps=2)}
    work = [Job(m, trajectory, arguments | {"method": m}) for m in ("newton", "sgd")]
    results = runner(empty_folder, processes=2).run(work, "")
    assert list(results) == ["newton", "sgd"]
    assert results["newton"] == json.loads(json.dumps(trajectory(method="newton", **arguments)))  # type: ignore[arg-type]


def test_intervals_are_those_of_scipy() -> None:
    values = [0.3, 1.0, -0.2, 0.8, 0.5]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-3)
    wide = [float(v) for v in torch.randn(60)]
    low, _ = stats.t.interval(0.95, 59, loc=sum(wide) / 60, scale=stats.sem(wide))
    assert mean_interval(wide).low == pytest.approx(low, abs=1e-4)
    assert mean_interval([2.0]).high == math.inf
    x, y = [1.0, 2.0, 2.0, 3.0, 5.0, 6.0, 7.0], [2.0, 1.0, 3.0, 3.0, 7.0, 6.0, 9.0]
    found = rank_correlation(x, y)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-6)
    assert found.low <= found.value <= found.high
    assert judge("", values, "").verdict == "reproduced in part"
    assert judge("", [1.0, 1.1, 0.9], "").verdict == "reproduced"
    assert judge("", [-1.0, -1.1, -0.9], "").verdict == "not reproduced"


def test_critical_points_of_any_index_are_found() -> None:
    for start, index in (((0.1, 0.2), 0.5), ((0.9, 0.1), 0.0)):
        x = torch.tensor(start, dtype=torch.float64, requires_grad=True)  # minima at (+-1, 0), a saddle between
        point = find_critical_point(
            lambda x=x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2, FlatParameters([x]), bound=1e-10, max_steps=50
        )
        assert point.found
        assert point.index == index
    with pytest.raises(ValueError, match="float64"):
        find_critical_point(lambda: 0, FlatParameters([torch.ones(1, requires_grad=True)]), bound=1, max_steps=1)  # type: ignore[arg-type,return-value]


def test_trajectories_on_the_quadratic_are_the_closed_forms() -> None:
    settings = Settings(steps=3, damping=1e-9)
    x0, y0 = 0.9, 0.05
    factors = {"sgd": (1 - 10 * 0.05, 1 + 2 * 0.05), "newton": (0, 0), "saddle_free": (0, 2)}
    factors["damped_newton"] = (1 - 10 / 12.5, 1 + 2 / 0.5)
    for method, (along_x, along_y) in factors.items():
        points = trajectory("saddle", method, settings)["points"]
        for step, (x, y) in enumerate(points):
            expected = (x0 * along_x**step, y0 * along_y**step)
            assert (x, y) == pytest.approx(expected, abs=1e-6)


def test_steps_at_a_networks_saddle_are_the_closed_forms() -> None:
    found = steps_along_eigenvectors(source="sample", seed=0, device="cpu")
    assert found["found"]
    assert min(found["eigenvalues"]) < 0 < max(found["eigenvalues"])
    for method in METHODS:
        for value, step in zip(found["eigenvalues"], found["steps"][method], strict=True):
            form = closed_form(method, value, found["lambda_min"])
            assert form is None or step == pytest.approx(form, abs=1e-3)


def test_momentum_schedule() -> None:
    assert [momentum_schedule(t, largest=0.99) for t in (0, 250, 750)] == pytest.approx([0.5, 0.75, 0.875])
    assert momentum_schedule(10**6, largest=0.9) == 0.9


def test_a_newton_step_that_ends_after_the_budget_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(plateau.time, "process_time", lambda: clock[0])
    model = torch.nn.Linear(3, 1)
    cases = torch.randn(8, 3)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return model(rows).square().mean()

    problem = plateau.Problem(model, cases, loss, lambda: float(loss(cases).detach()), 8)
    optimizer = SaddleFreeNewton.as_in_paper(model.parameters(), krylov_dim=2, inner_steps=1)
    step_on = optimizer.step_on

    def slow(*arguments: Any, **options: Any) -> Any:
        clock[0] += 0.4
        return step_on(*arguments, **options)

    monkeypatch.setattr(optimizer, "step_on", slow)
    curve = plateau.Curve(problem, torch.arange(8), 0)
    generator = torch.Generator().manual_seed(0)
    budget = plateau.Budget(seconds=1.0)
    taken = plateau.newton_arm(problem, curve, optimizer, budget=budget, curvature_cases=8, generator=generator)
    assert len(taken) == 2
    assert curve.seconds == pytest.approx([0.0, 0.4, 0.8])
    assert problem.metric() == curve.metric[-1]


TINY: dict[str, Any] = {
    "fig1": figure1.Settings(
        image_size=3, cases=30, hidden=2, epochs=2, trajectory_points=2, uniform_points=2, bound=1e-2, max_steps=4
    ),
    "fig3": figure3_runs.Settings(
        hidden=(2, 3), image_size=3, cases=40, newton_epochs=2, sgd_epochs=3, draws=2, part=25, probes=2
    ),
    "fig4": figure4.Settings(
        figure4_autoencoder.Settings(
            (9, 5, 3), 3, 40, 20, 0.05, patience=1, max_epochs=2, seconds=0.05, krylov_dim=4, inner_steps=1,
            curvature_cases=20, part=25, probe_cases=20, probe_dim=5, probe_every=(1, 1),
        ),
        figure4_recurrent.Settings(
            4, 300, 5, 10, 2, 1, 1, 0.01, 2, seconds=0.05, krylov_dim=4, inner_steps=1, curvature_cases=20, part=40,
            probe_cases=10, probe_dim=5,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["fig1", "fig2", "fig3", "fig4"])
def test_a_tiny_run_of_each_figure(name: str, empty_folder: Path) -> None:
    common: dict[str, Any] = {"scale": "small", "output": empty_folder, "sources": SAMPLES, "progress": False}
    whole = reproduce(name, seeds=2, settings=TINY.get(name), **common)
    written = {path.name for path in empty_folder.iterdir()}
    assert written >= {f"{name}.{suffix}" for suffix in ("json", "csv", "png", "pdf")}
    assert all(v["verdict"] in ("reproduced", "reproduced in part", "not reproduced") for v in whole["verdicts"])
    assert json.loads((empty_folder / f"{name}.json").read_text())["seeds"] == 2
    files = {path: path.stat().st_mtime_ns for path in (empty_folder / "jobs").iterdir()}
    reproduce(name, seeds=1, settings=TINY.get(name), **common)
    assert {path: path.stat().st_mtime_ns for path in (empty_folder / "jobs").iterdir()} == files


@pytest.mark.parametrize(
    ("scale", "mnist", "device", "shown"),
    [
        ("small", "sample", "cpu", "--scale small --seeds 1"),
        ("small", "somebody/digits", "cpu", "--scale small --seeds 1 --mnist somebody/digits"),
        ("small", "folder/of/mnist", "cuda:1", "--scale small --seeds 1 --mnist mnist --device cuda:1"),
        ("paper", "sample", "cpu", "--scale paper --seeds 1 --mnist sample"),
        ("paper", HUB_IDS["mnist"], "cpu", "--scale paper --seeds 1"),
    ],
)
def test_the_recorded_command_is_the_one_that_was_given(
    empty_folder: Path, scale: str, mnist: str, device: str, shown: str
) -> None:
    (empty_folder / "folder" / "of" / "mnist").mkdir(parents=True)
    figure = dataclasses.replace(find_figure("fig2"), verdicts=lambda _: [])
    fingerprint = {"scale": scale, "settings": {}, "sources": {"mnist": mnist}, "device": device}
    whole = _whole(figure, fingerprint, 1, {})
    assert whole["command"] == f"lightning-sfn reproduce fig2 {shown}"
    assert whole["device"] == device


def test_mistakes_end_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_folder: Path
) -> None:
    with pytest.raises(argparse.ArgumentError, match=r"There is no figure 'fig5'.*did you mean"):
        main(["fig5"])
    (empty_folder / "file").write_text("")
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: (_ for _ in ()).throw(AssertionError("no CUDA here")))
    for words, status, said in (
        (["figg1"], 2, "There is no figure 'figg1'"),
        ([], 2, "the following arguments are required: figure"),
        (["fig2", "--colour", "3"], 2, "unrecognized arguments: --colour 3"),
        (["fig2", "--scale", "huge"], 2, "invalid choice"),
        (["fig3", "--seeds", "0"], 1, "0 seeds"),
        (["fig2", "--mnist", "nowhere", "--no-progress"], 1, "'nowhere'"),
        (["fig2", "--device", "foo"], 1, "The device 'foo' cannot be used here"),
        (["fig2", "--device", "meta"], 1, "The device 'meta' cannot be used here"),
        (["fig2", "--device", "cuda"], 1, "The device 'cuda' cannot be used here (no CUDA here)"),
        (["fig2", "--output", str(empty_folder / "file")], 1, "file' cannot be a folder (File exists)"),
        (["fig2", "--output", str(empty_folder / "file" / "x")], 1, "x' cannot be a folder (Not a directory)"),
    ):
        assert cli.main(["reproduce", *words]) == status
        (error,) = capsys.readouterr().err.splitlines()
        assert said in error


def test_missing_matplotlib_shows_before_the_work(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> None:
    monkeypatch.setattr("lightning_sfn.experiments.reproduce.find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match="pictures need matplotlib"):
        reproduce("fig2", scale="small", output=empty_folder / "new", seeds=1, sources=SAMPLES)
    assert not (empty_folder / "new").exists()
