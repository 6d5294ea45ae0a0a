"""Tables and Figure 4 (a, b) from a results file."""

import json
import math
from pathlib import Path
from typing import Any

from lightning_sfn.experiments.conditions import rounded
from lightning_sfn.experiments.runner import write_atomically
from paper_scale.arms import START
from paper_scale.results import Row, read
from paper_scale.settings import METHODS

__all__ = ["LABELS", "TARGETS", "curves", "summary", "write_report"]

TARGETS = (0.69, 0.57, 0.30)
"""Errors whose times are reported: Hessian-free as cited by the paper, the paper's own, and ours to reach."""

LABELS = {
    "sfn": "SFN, ours",
    "sfn_paper": "SFN, the paper's",
    "adam": "Adam, decayed",
    "nesterov": "Nesterov momentum",
    "momentum": "classical momentum",
    "lbfgs": "L-BFGS, full batch",
}
_SECONDS = (5, 10, 30, 60, 120, 300, 600)
_PRODUCTS = (10, 100, 300, 1000, 3000, 10_000, 30_000)


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method from the initialization on, the start of SFN's arms included.

    Args:
        rows: The results file's.
    """
    found = {name: [row for row in rows if row["arm"] == name] for name in METHODS}
    start = [row for row in rows if row["arm"] == START]
    for name in ("sfn", "sfn_paper"):
        if found[name] and found[name][0]["seconds"] > 0:
            found[name] = start + found[name]
    return {name: arm for name, arm in found.items() if arm}


def summary(rows: list[Row]) -> dict[str, Any]:
    """What the tables say, as numbers.

    Args:
        rows: The results file's.

    Returns:
        For each method: its last and best errors, what it spent, the seconds to each target, and the errors at round
        numbers of seconds and products (None where it never was).
    """
    found: dict[str, Any] = {}
    for name, arm in curves(rows).items():
        own = [row for row in arm if row["arm"] == name]
        last = arm[-1]
        best = min(arm, key=lambda row: row["train_error"] if math.isfinite(row["train_error"]) else math.inf)
        found[name] = {
            "complete": bool(last["last"]),
            "best": best["train_error"],
            "best_seconds": best["seconds"],
            **{key: last[key] for key in ("train_error", "test_error", "cross_entropy", "seconds")},
            **{key: last[key] for key in ("updates", "products", "gradients")},
            "to_target": {str(target): _first_below(arm, target) for target in TARGETS},
            "at_seconds": {str(mark): _at(arm, "seconds", mark) for mark in _SECONDS},
            "at_products": {str(mark): _at(own, "products", mark) for mark in _PRODUCTS} if last["products"] else {},
        }
    return found


def write_report(results: Path, folder: Path, output: Path | None = None) -> str:
    """Writes ``summary.json``, ``report.md`` and, where matplotlib is installed, ``figure4.png``.

    Args:
        results: The results file.
        folder: Where they go.
        output: Where the summary goes instead.

    Returns:
        The report.

    Raises:
        ResultsError: There is no results file.
    """
    header, rows = read(results)
    numbers = summary(rows)
    write_atomically(
        output or folder / "summary.json", json.dumps(rounded({**header, "methods": numbers}), indent=1) + "\n"
    )
    text = "\n".join([*_tables(numbers), _roofline_table(folder / "roofline.json"), _measured(header)])
    picture = _draw(curves(rows), folder / "figure4.png")
    text += f"\n{picture}\n"
    write_atomically(folder / "report.md", text)
    return text


def _tables(numbers: dict[str, Any]) -> list[str]:
    names = list(numbers)
    whole = [
        [
            LABELS[name] + ("" if numbers[name]["complete"] else " (not finished)"),
            *(_number(numbers[name][key]) for key in ("best", "best_seconds", "test_error", "cross_entropy")),
            *(_number(numbers[name]["to_target"][str(target)]) for target in TARGETS),
            *(f"{numbers[name][key]:,.0f}" for key in ("updates", "gradients", "products")),
        ]
        for name in names
    ]
    head = ["method", "best training error", "after s", "test error", "cross-entropy"]
    head += [f"s to {target:g}" for target in TARGETS] + ["updates", "gradients", "products"]
    by_seconds = [[LABELS[name], *map(_number, numbers[name]["at_seconds"].values())] for name in names]
    by_products = [
        [LABELS[name], *map(_number, numbers[name]["at_products"].values())]
        for name in names
        if numbers[name]["at_products"]
    ]
    return [
        _table(head, whole),
        "Training error by seconds:\n",
        _table(["method", *(f"{mark} s" for mark in _SECONDS)], by_seconds),
        "Training error by products since the start:\n",
        _table(["method", *(f"{mark:,}" for mark in _PRODUCTS)], by_products),
    ]


def _roofline_table(path: Path) -> str:
    if not path.exists():
        return "The parts of a step have not been timed: run the subcommand 'roofline'.\n"
    content = json.loads(path.read_text())
    rows = [
        [
            row["part"],
            f"{row['seconds']:.3g}",
            f"{row['share_of_sfn_paper']:.0%}",
            f"{row['share_of_sfn']:.0%}",
            f"{row['share_of_roofline']:.0%}",
            row["limit"],
        ]
        for row in content["parts"]
    ]
    device, basis = content["device"], content["bfloat16_basis"]
    return _table(["part", "s", "of the paper's step", "of ours", "of its roofline", "limit"], rows) + (
        f"\nMatrix rate {device['flop_rate']:.3g} FLOP/s, bandwidth {device['bandwidth']:.3g} B/s. A basis of "
        f"{basis['krylov_dim']} vectors in bfloat16: Ritz values off by {basis['ritz_error']:.1e}, step by "
        f"{basis['step_error']:.1e}.\n"
    )


def _measured(header: Row) -> str:
    with_, device = header["conditions"], header["configuration"]["device"]
    where = with_["processor"] if device == "cpu" else device
    return f"Begun {with_['date']} on {where}, torch {with_['torch']}.\n"


def _at(arm: list[Row], key: str, mark: float) -> float | None:
    """The error when a mark was reached: that of the last row before it, None if the arm ends or begins elsewhere."""
    before = [row for row in arm if row[key] <= mark]
    return before[-1]["train_error"] if before and arm[-1][key] >= 0.9 * mark else None


def _first_below(arm: list[Row], target: float) -> float | None:
    return next((row["seconds"] for row in arm if row["train_error"] < target), None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _draw(arms: dict[str, list[Row]], path: Path) -> str:
    """Figure 4 (a): error by seconds. (b): size of the most negative eigenvalue, and gradient norm, by seconds."""
    try:
        import matplotlib
    except ImportError:
        return "Figure 4 was not drawn: matplotlib is not installed."
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (name, arm) in enumerate(arms.items()):
        seconds, colour = [row["seconds"] for row in arm], f"C{number}"
        left.plot(seconds, [row["train_error"] for row in arm], label=LABELS[name], color=colour)
        if name not in ("sfn", "sfn_paper", "momentum"):
            continue
        probed = [row for row in arm if "lambda_min" in row]
        depth = [max(-row["lambda_min"], row["lambda_min_residual"]) for row in probed]
        right.plot([row["seconds"] for row in probed], depth, color=colour, marker=".", label=f"{LABELS[name]}: depth")
        norms = [row.get("gradient_norm", math.nan) for row in arm]
        right.plot(seconds, norms, color=colour, linestyle="--", label=f"{LABELS[name]}: gradient norm")
    for target in TARGETS:
        left.axhline(target, color="0.7", linewidth=0.8, linestyle=":")
    left.set(title="(a) training error", xlabel="seconds", ylabel="squared error per image", yscale="log", xscale="log")
    right.set(title="(b) most negative eigenvalue (or its error), gradient norm", xlabel="seconds", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Figure 4 (a, b): {path}"
