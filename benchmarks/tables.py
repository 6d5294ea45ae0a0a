"""Writes the README's tables from the results files.

    python benchmarks/tables.py [--check]

Each table stands between `<!-- table: NAME -->` and `<!-- end table -->`. With ``--check`` nothing is written, and the
exit status says whether the README agrees with the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import RESULTS

README = Path(__file__).parent.parent / "README.md"


def main() -> int:
    """Fills or checks the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    old = README.read_text()
    new = re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", _fill, old, flags=re.DOTALL)
    if options.check:
        return int(new != old)
    README.write_text(new)
    return 0


def _fill(found: re.Match[str]) -> str:
    return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())  # type: ignore[no-any-return]


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _measured(results: dict[str, Any], command: str) -> str:
    with_ = results["conditions"]
    return (
        f"\nMeasured {with_['date']} by `{command}` on {with_['cores']} cores of {with_['processor']}, "
        f"{with_['threads']} thread, torch {with_['torch']}.\n"
    )


def escape() -> str:
    """What the main recipe does, seed by seed."""
    results = _load("autoencoder_escape")
    header = ["seed", "plateau", "after SFN", "SGD steps", "SFN steps (taken)", "Hv products", "seconds SGD + SFN"]
    header += ["smallest / largest eigenvalue at the switch", "at the end"]
    rows = [
        [
            str(run["seed"]),
            f"{run['plateau']:.3f}",
            f"**{run['final']:.3f}**",
            str(run["first_steps"]),
            f"{run['newton_steps']} ({run['accepted_steps']})",
            str(run["products"]),
            f"{run['first_seconds']:.0f} + {run['newton_seconds']:.0f}",
            *(f"{low:.2g} / {high:.2g}" for low, high in zip(run["lambda_min"], run["lambda_max"], strict=True)),
        ]
        for run in results["runs"]
    ]
    return _rows(header, rows) + _measured(results, "python benchmarks/autoencoder_escape.py")


def stall() -> str:
    """Final losses of the first-order search."""
    results = _load("stall_search")
    seeds = len(results["runs"][0]["final"])
    header = ["optimizer", "learning rate", *(f"seed {seed}" for seed in range(seeds))]
    rows = [
        [run["method"].upper() if run["method"] == "sgd" else "Adam", f"{run['lr']:g}"]
        + [
            f"{loss:.2f}" if loss > 0.97 * results["error_of_mean_image"] else f"**{loss:.2f}**"
            for loss in run["final"]
        ]
        for run in results["runs"]
    ]
    note = (
        f"\nLoss on all 5,000 images after {results['settings']['epochs']} epochs; the mean image has "
        f"{results['error_of_mean_image']:.3f}; what escaped is bold.\n"
    )
    return _rows(header, rows) + note + _measured(results, "python benchmarks/stall_search.py")


def plateau() -> str:
    """Spectra on the plateau, on all data and on a tenth of it."""
    results = _load("plateau_spectrum")
    header = ["point", "data", "smallest eigenvalue", "its residual", "largest eigenvalue", "gradient norm"]
    rows = [
        [
            row["point"],
            row["data"],
            f"{row['lambda_min']:.2g}",
            f"{row['residual']:.0e}",
            f"{row['lambda_max']:.2g}",
            f"{row['gradient_norm']:.1e}",
        ]
        for row in results["spectra"]
    ]
    return _rows(header, rows) + _measured(results, "python benchmarks/plateau_spectrum.py")


def accuracy() -> str:
    """Eigenvalues against a float64 reference, and what they cost."""
    results = _load("spectrum_accuracy")
    header = [
        "method",
        "asked for",
        "basis",
        "products",
        "largest right in order",
        "their worst error",
        "smallest: error",
    ]
    rows = [
        [
            row["method"],
            row["asked"],
            str(row["basis"]),
            str(row["products"]),
            "" if row["largest_right_in_order"] is None else f"{row['largest_right_in_order']} of 10",
            "" if row["largest_worst_error"] is None else f"{row['largest_worst_error']:.0e}",
            "" if row["smallest_error"] is None else f"{row['smallest_error']:.0e}",
        ]
        for row in results["rows"]
    ]
    note = "\nErrors are relative; right means within 1e-3.\n"
    return _rows(header, rows) + note + _measured(results, "python benchmarks/spectrum_accuracy.py")


TABLES: dict[str, Callable[[], str]] = {"escape": escape, "stall": stall, "plateau": plateau, "accuracy": accuracy}


if __name__ == "__main__":
    sys.exit(main())
