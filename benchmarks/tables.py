"""Writes the tables of the README and of docs/paper.md from the results files.

    python benchmarks/tables.py [--check]

Each table stands between `<!-- table: NAME -->` and `<!-- end table -->`. With ``--check`` nothing is written, and the
exit status says whether the pages agree with the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from record import RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "paper.md")


def main() -> int:
    """Fills or checks the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = 0
    for page in PAGES:
        old = page.read_text()
        new = re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", _fill, old, flags=re.DOTALL)
        stale |= new != old
        if not options.check:
            page.write_text(new)
    return int(stale and options.check)


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


FIGURES = ("fig1", "fig2", "fig3", "fig4")


def paper() -> str:
    """How many claims of each figure were reproduced."""
    header = ["figure", "what", "seeds", "reproduced", "in part", "not"]
    rows = []
    for name in FIGURES:
        results = _load(name)
        verdicts = [verdict["verdict"] for verdict in results["verdicts"]]
        counts = [str(verdicts.count(v)) for v in ("reproduced", "reproduced in part", "not reproduced")]
        rows.append([name, results["title"], str(results["seeds"]), *counts])
    return _rows(header, rows)


def claims(name: str) -> str:
    """The claims of one figure beside what was measured."""
    results = _load(name)
    rows = [[v["claim"], v["measured"].replace("|", "\\|"), f"*{v['verdict']}*"] for v in results["verdicts"]]
    settings = ", ".join(f"{key} {value}" for key, value in results["settings"].items() if not isinstance(value, dict))
    note = f"\n{results['caption']}\n" + (f"\nSettings: {settings}.\n" if settings else "")
    return _rows(["claim", "measured", "verdict"], rows) + note + _measured(results, results["command"])


TABLES: dict[str, Callable[[], str]] = {"escape": escape, "stall": stall, "plateau": plateau, "paper": paper}
TABLES |= {name: partial(claims, name) for name in FIGURES}


if __name__ == "__main__":
    sys.exit(main())
