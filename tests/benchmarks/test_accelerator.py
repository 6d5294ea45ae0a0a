"""The CPU's figures beside those of a device, on results made up by hand; and what results of a device are called."""

from typing import Any

import accelerator
import engine as engine_script
import pytest
import race as race_script
import record
import rounded_products
import torch

Found = dict[str, Any]


def engine(ratio: float, share: float) -> Found:
    case = {"case": "MLP", "micro_batches": 10, "ratio": ratio, "target": 1.85}
    return {
        "products": [case],
        "steps": [
            {
                "where": "plain torch",
                "coordinates": "kronecker",
                "targets": {"everything else": 0.05},
                "shares": {"everything else": share},
            }
        ],
        "spectrum": {
            "target": 150,
            "rows": [{"asked": 10, "right": 9, "smallest_right": True, "gradients": 120.4}],
        },
        "basis": {
            "orthogonality": {"deviation": 1.2e-7, "target": 2e-6},
            "time": [{"basis": 128, "cases": 2048, "ratio": 1.11, "target": 1.2}],
            "waits": [{"basis": 64, "waits": 4}],
        },
    }


def race(ours: float) -> Found:
    finals = {"adam": 2.0, "kfac": 1.5, "turns": ours, "sgd": 3.0, "lbfgs": 3.0}
    common = {"task": "cifar escape", "seed": 0, "start": 4.0, "seconds": 5.0}
    return {"runs": [common | {"method": method, "final": final} for method, final in finals.items()]}


def test_cells_of_what_was_not_measured_are_empty() -> None:
    results: dict[str, Found] = {"engine": engine(1.5, 0.04), "race": race(1.0)}
    rows = accelerator.compared(results.get)
    assert len(rows) == 8
    assert all(row[3] == "" and row[2] for row in rows)
    results["engine_cuda"] = {"products": engine(1.25, 0.5)["products"]}
    filled = accelerator.compared(results.get)
    assert [row[:3] for row in filled] == [row[:3] for row in rows]
    assert [row[3] for row in filled] == ["1.25", *7 * [""]]


def test_figures_of_both_stand_in_one_row_with_their_target() -> None:
    spectra = [{"task": "a", "format": name, "smallest_errors": [0.8, 0.1]} for name in ("float32", "tf32")]
    results = {
        "engine": engine(1.5, 0.04),
        "engine_cuda": engine(1.25, 0.5),
        "rounded_products": {"spectra": spectra},
        "race": race(1.0),
        "race_cuda": race(1.5),
    }
    assert accelerator.compared(results.get) == [
        ("product / gradient: MLP, 10 micro-batches", "<= 1.85", "1.50", "1.25"),
        (
            "10 largest and the smallest eigenvalue, in gradients",
            "<= 150",
            "120, not all right",
            "120, not all right",
        ),
        ("largest entry of VV' - 1", "<= 2e-06", "1.2e-07", "1.2e-07"),
        ("128 vectors, 2048 images: all / products", "<= 1.2", "1.11", "1.11"),
        ("waits for the device, 64 vectors", "", "4", "4"),
        ("everything else in a step, plain torch, kronecker", "< 5%", "4.0%", "50.0%"),
        ("smallest Ritz value with TF32 (CPU: simulated), relative error: a", "", "8e-01", ""),
        ("cifar escape, 5 s: loss / Adam's", "<= 0.5", "0.50", "0.75"),
        ("cifar escape, 5 s: decrease / K-FAC's", ">= 1.15", "1.20", "1.00"),
    ]


def test_a_race_without_all_rivals_compares_with_none() -> None:
    results = {"race": race(1.0)}
    results["race"]["runs"] = [run for run in results["race"]["runs"] if run["method"] != "lbfgs"]
    assert accelerator.compared(results.get) == []


@pytest.mark.parametrize("script", [engine_script, race_script, rounded_products])
@pytest.mark.parametrize(
    ("device", "said"),
    [("cud", "argument --device: 'cud' is no device"), ("cuda", "argument --device: there is no CUDA device here")],
)
def test_a_device_that_is_not_there_is_refused_in_a_sentence(
    script: Any, device: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["script", "--device", device])
    with pytest.raises(SystemExit):
        script.main()
    assert said in capsys.readouterr().err


def test_results_of_a_device_lie_beside_those_of_the_cpu() -> None:
    assert record.named("race", torch.device("cpu")) == "race"
    assert record.named("race", torch.device("cuda:0")) == "race_cuda"
    assert record.processor_of(torch.device("cpu")) is None
