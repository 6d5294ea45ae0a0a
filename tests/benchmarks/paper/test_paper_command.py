"""The script as it is called: pieces, mistakes, the report, and no more packages than it says."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paper_scale.command import WORK_LEFT, main
from paper_scale.images import Images
from paper_scale.report import summary

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SMALL = ["sizes=(49,12,4)", "side=7", "cases=150", "updates=6", "start_seconds=1", "seconds=1.2", "batch_size=50"]
SMALL += ["rates=(0.05,)", "momenta=(0.9,)", "adam_rates=(0.003,)", "krylov_dim=5", "probe_cases=50", "probe_dim=4"]
SMALL += ["part=100"]


@pytest.fixture
def data(images: Images, tmp_path: Path) -> str:
    full = {
        split: pixels.view(-1, 7, 7).repeat_interleave(4, 1).repeat_interleave(4, 2) for split, pixels in images.items()
    }
    torch.save({split: pixels.flatten(1) for split, pixels in full.items()}, tmp_path / "mnist.pt")
    return str(tmp_path / "mnist.pt")


def test_pieces_until_done_then_the_report(
    data: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    words = ["run", "--data", data, "--device", "cpu", "--set", *SMALL, "--methods", "adam", "sfn"]
    assert main([*words, "--steps", "2"]) == WORK_LEFT
    for _ in range(100):
        if main(words) == 0:
            break
    assert "All is done" in caplog.text
    folder = Path("runs/paper_autoencoder")
    assert main(["roofline", "--data", data, "--device", "cpu", "--set", *SMALL]) == 0
    assert main(["report"]) == 0
    text = capsys.readouterr().out
    assert "| SFN, ours |" in text
    assert "| Adam, decayed |" in text
    assert "Matrix rate" in text
    assert (folder / "report.md").read_text() == text.rstrip("\n") + "\n"
    assert (folder / "figure4.png").stat().st_size > 10_000
    assert set(json.loads((folder / "summary.json").read_text())["methods"]) == {"sfn", "adam"}
    assert any((folder / "tensorboard").iterdir())


def test_another_configuration_and_no_results_are_refused(data: str, caplog: pytest.LogCaptureFixture) -> None:
    words = ["run", "--data", data, "--device", "cpu", "--steps", "1", "--methods", "adam", "--set", *SMALL]
    assert main(words) == WORK_LEFT
    assert main([*words, "seed=3"]) == 2
    assert "another configuration (seed is 0 there and 3 here)" in caplog.text
    assert main(["report", "--folder", "nowhere"]) == 2
    assert "There is no results file" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("colour=red", "The setting 'colour=red' is unknown"),
        ("seconds", "give name=value"),
        ("start_seconds=7000", "start_seconds is 7000, but it is part of"),
        ("start_method=lbfgs", "start_method is 'lbfgs'"),
        ("matmul=fp8", "matmul is 'fp8'"),
        ("side=14", "sizes begins with 49, but the images have 196 pixels"),
        ("batch_size=500", "one mini-batch has 500"),
        ("note_ratio=1", "a factor above 1"),
    ],
)
def test_mistakes_are_said_in_a_sentence(data: str, caplog: pytest.LogCaptureFixture, change: str, said: str) -> None:
    assert main(["run", "--data", data, "--device", "cpu", "--set", *SMALL, change]) == 2
    assert said in caplog.text
    assert not Path("runs").exists()


def test_without_cuda_it_says_so_and_is_small(
    data: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "--data", data, "--steps", "0", "--set", "updates=6"]) == WORK_LEFT
    assert "There is no CUDA device here: running on the processor, at the small scale" in caplog.text
    header = json.loads(Path("runs/paper_autoencoder/results.jsonl").read_text().splitlines()[0])
    assert header["configuration"]["settings"]["side"] == 14
    assert main(["run", "--data", data, "--device", "cuda"]) == 2
    assert "There is no CUDA device here: leave --device out" in caplog.text


def test_torch_lightning_and_torchmetrics_are_enough(data: str) -> None:
    """Everything else that this environment has is made to look absent, to imports and to package metadata."""
    hidden = ["datasets", "matplotlib", "jsonargparse", "scipy", "tensorboard", "pyarrow", "PIL", "pandas", "rich"]
    program = f"""
import importlib.metadata as metadata, sys
hidden = {hidden!r}
known = metadata.distribution
def distribution(name):
    if name.lower() in hidden + ["pillow"]:
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.distribution = distribution
sys.modules.update(dict.fromkeys(hidden))
sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent)!r}]
from paper_scale.command import main
words = sys.argv[1:]
print(main(words), main(["report"]))
"""
    words = ["run", "--data", data, "--device", "cpu", "--steps", "4", "--methods", "sfn", "--set", *SMALL]
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{WORK_LEFT} 0\n")
    assert "tensorboard is not installed" in done.stderr
    assert "start: begins" in done.stderr
    assert "matplotlib is not installed" in done.stdout


def test_summary_of_known_rows() -> None:
    def row(arm: str, seconds: float, products: int, error: float, last: bool = False) -> dict[str, object]:
        spent = {"updates": products, "gradients": 2.0 * products, "test_error": 1.0, "cross_entropy": 1.0}
        return {"arm": arm, "seconds": seconds, "products": products, "train_error": error, "last": last, **spent}

    rows = [
        row("start", 0.0, 0, 60.0),
        row("start", 20.0, 0, 1.0, True),
        row("sfn", 20.0, 0, 1.0),
        row("sfn", 50.0, 90, 0.6),
        row("sfn", 90.0, 200, 0.5),
        row("sfn", 120.0, 290, 0.52, True),
        row("search/adam/rate=1", 1.0, 0, 0.1, True),
    ]
    found = summary(rows)
    assert list(found) == ["sfn"]
    sfn = found["sfn"]
    assert (sfn["best"], sfn["best_seconds"], sfn["train_error"]) == (0.5, 90.0, 0.52)
    assert sfn["to_target"] == {"0.69": 50.0, "0.57": 90.0, "0.3": None}
    assert sfn["at_seconds"] == {"5": 60.0, "10": 60.0, "30": 1.0, "60": 0.6, "120": 0.52, "300": None, "600": None}
    assert [sfn["at_products"][mark] for mark in ("10", "100", "300", "1000")] == [1.0, 0.6, 0.52, None]


def test_the_recurrent_network_by_an_option(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Path("text").mkdir()
    Path("text/x.train.txt").write_text("abcab cabba\n" * 100)
    Path("text/x.test.txt").write_text("abc cab\n" * 20)
    words = ["run", "--task", "recurrent", "--data", "text", "--device", "cpu", "--methods", "sfn", "--set"]
    words += [
        "cases=20",
        "batch_size=5",
        "updates=8",
        "rates=(0.5,)",
        "momenta=(0.9,)",
        "start_seconds=1",
        "seconds=1.5",
    ]
    assert main([*words, "probe_cases=10", "probe_dim=4"]) == 0
    rows = [json.loads(line) for line in Path("runs/paper_autoencoder/results.jsonl").read_text().splitlines()[1:]]
    last = rows[-1]
    assert last["arm"] == "sfn"
    assert last["train_error"] == pytest.approx(last["cross_entropy"] / math.log(2))
    assert last["train_error"] < rows[1]["train_error"]
    assert main(["roofline", "--task", "recurrent", "--data", "text", "--device", "cpu"]) == 2
    assert "The roofline is that of the autoencoder" in caplog.text
