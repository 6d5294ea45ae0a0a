"""Writes the tables of the README and of the pages in `docs` from the results files.

    python benchmarks/tables.py [--check]

Each table stands between `<!-- table: NAME -->` and `<!-- end table -->`. With ``--check`` nothing is written, and the
exit status says whether they agree with the results.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerator import compared
from engine_parts.tables import TABLES as ENGINE
from record import RESULTS
from suite.methods import METHODS
from suite.standings import JUDGED, KFAC_TARGET, Standing, standings
from suite.tasks import EVERY, TASKS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    """Fills or checks the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    differ = False
    for page in PAGES:
        old = page.read_text()
        new = re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", _fill, old, flags=re.DOTALL)
        differ |= new != old
        if not options.check:
            page.write_text(new)
    return int(options.check and differ)


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
        f"\nMeasured {with_['date']} by `{command}` on {with_['cores']} cores of {_processor(with_)}, "
        f"{with_['threads']} thread, torch {with_['torch']}.\n"
    )


def _processor(with_: dict[str, Any]) -> str:
    return str(with_["processor"]).replace("(R)", "").removesuffix(" Processor")


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


def basis() -> str:
    """Memory and accuracy of the ways to hold a basis."""
    results = _load("sharded_basis")
    header = ["processes", "basis", "basis of each, MiB", "peak growth of each, MiB", "Ritz values", "step"]
    rows = [
        [
            str(run["processes"]),
            run["basis"],
            f"{run['basis_mib']:.0f}",
            f"{run['peak_mib']:.0f}",
            f"{run['ritz_error']:.0e}",
            f"{run['step_error']:.0e}",
        ]
        for run in results["runs"]
    ]
    return _rows(header, rows) + _measured(results, "python benchmarks/sharded_basis.py")


def scale() -> str:
    """Predictions of the cost model."""
    rows = [
        [
            f"{row['n']:.0e}".replace("e+0", "e"),
            str(row["devices"]),
            *(f"{row[name]:,.3g}" if row[name] < 1000 else f"{row[name]:,.0f}" for name in _SCALE),
        ]
        for row in _load("sharded_basis")["predictions"]
    ]
    return _rows(["n", "devices", *_SCALE.values()], rows)


_SCALE = {
    "replicated_gb": "replicated basis, GB",
    "sharded_gb": "sharded, GB",
    "sharded_bf16_gb": "sharded bfloat16, GB",
    "vectors_gb": "12 vectors, GB",
    "sent_gb": "sent for products, GB",
    "product_tflop": "products, TFLOP",
    "orthogonalisation_tflop": "orthogonalisation, TFLOP",
}


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


def _race_of_one_budget(name: str) -> dict[str, Any]:
    """Results of a race, only the runs of its budget: the one that most runs have."""
    results = _load(name)
    budget = Counter(run["seconds"] for run in results["runs"]).most_common(1)[0][0]
    return results | {"runs": [run for run in results["runs"] if run["seconds"] == budget]}


def accelerator() -> str:
    """The CPU's figures beside those of a CUDA device."""

    def load(name: str) -> dict[str, Any] | None:
        if not (RESULTS / f"{name}.json").exists():
            return None
        return _race_of_one_budget(name) if name.startswith("race") else _load(name)

    rows = [list(row) for row in compared(load)]
    on_cuda = [
        found["settings"]["device"] for name in ("engine", "rounded_products") if (found := load(f"{name}_cuda"))
    ]
    return _rows(["what", "target", "CPU", (on_cuda or ["CUDA device"])[0]], rows)


def rounded_spectra() -> str:
    """What rounding of products does to eigenvalues."""
    results = _load("rounded_products")
    header = ["start", "products", "smallest eigenvalue", "its error", "its stated residual", "the next two: errors"]
    header += ["largest eigenvalue", "three largest: errors", "largest entry of VV' - 1"]
    rows = [
        [
            row["task"],
            row["format"],
            f"{row['lambda_min']:.2g}",
            f"{row['smallest_error']:.1g}",
            f"{row['smallest_residual']:.1g}",
            ", ".join(f"{error:.0e}" for error in row["smallest_errors"][1:]),
            f"{row['lambda_max']:.3g}",
            ", ".join(f"{error:.0e}" for error in row["largest_errors"]),
            f"{row['deviation']:.0e}",
        ]
        for row in results["spectra"]
    ]
    return _rows(header, rows) + _measured(results, _ROUNDED)


def rounded_steps() -> str:
    """What rounding of products does to steps."""
    results = _load("rounded_products")
    formats = [name for name in results["steps"][0] if name not in ("task", "method", "steps")]
    rows = [
        [row["task"], row["method"], str(row["steps"])]
        + [", ".join("failed" if loss is None else f"{loss:.3g}" for loss in row[name]) for name in formats]
        for row in results["steps"]
    ]
    return _rows(["start", "method", "steps", *formats], rows) + _measured(results, _ROUNDED)


def _standings(results: dict[str, Any], *, tuning: bool | None) -> list[Standing]:
    """The tasks of one half (of both and besides for ``None``)."""
    tasks = EVERY if tuning is None else TASKS
    return standings(results["runs"], {t.name: t.kind for t in tasks.values() if tuning in (t.tuning, None)})


def race(*, tuning: bool | None, name: str = "race", command: str = "") -> str:
    """Final losses of all methods on one half of the suite, or on both."""
    results = _race_of_one_budget(name)
    rows = _standings(results, tuning=tuning)
    methods = [m for m in METHODS if any(m in row.losses for row in rows)]
    table = [
        [row.task, row.kind, str(len(next(iter(row.losses.values())))), f"{row.start:.4g}"]
        + [_spread(row.losses.get(m), m == min(row.losses, key=row.median)) for m in methods]
        + [_raced(results["runs"], row.task)]
        for row in rows
    ]
    with_, seconds = results["conditions"], results["runs"][0]["seconds"]
    command = command or f"python benchmarks/race.py --seconds {seconds:g}"
    note = (
        f"\nFull training loss after {seconds:g} s: median of the seeds (lowest to highest); the best is bold. "
        f"Measured by `{command}` on {with_['cores']} cores, {with_['threads']} thread, torch {with_['torch']}; "
        "a row's methods on one kind of processor.\n"
    )
    return _rows(["task", "kind", "seeds", "start", *methods, "raced"], table) + note


def _raced(runs: list[dict[str, Any]], task: str) -> str:
    """When and on which processor."""
    return ", ".join(sorted({f"{run['date']} on {_processor(run)}" for run in runs if run["task"] == task}))


def targets(*, tuning: bool | None, name: str = "race") -> str:
    """The recipe against the targets, where all that they speak of has run."""
    table = []
    for row in _standings(_race_of_one_budget(name), tuning=tuning):
        if not row.is_judged:
            continue
        rival, ratio = row.against(JUDGED)
        met, met_kfac = row.reached(JUDGED)
        what = "loss / Adam's" if row.kind == "escape" else f"decrease / that of {rival}"
        table.append(
            [row.task, what, f"{ratio:.2f}", row.wanted, _yes(met), f"{row.against_kfac(JUDGED):.2f}", _yes(met_kfac)]
        )
    header = ["task", "what", "measured", "target", "reached", "decrease / K-FAC's", f"reached {KFAC_TARGET}"]
    return _rows(header, table)


def _spread(losses: list[float] | None, best: bool) -> str:
    if losses is None:
        return ""
    middle = f"**{statistics.median(losses):.4g}**" if best else f"{statistics.median(losses):.4g}"
    return middle if len(losses) == 1 else f"{middle} ({min(losses):.4g} to {max(losses):.4g})"


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def searched() -> str:
    """The settings that the search chose for each task."""
    runs = _race_of_one_budget("race")["runs"]
    names = [m for m in METHODS if any(run["method"] == m and run["settings"] for run in runs)]
    chosen = {(run["task"], run["method"]): run["settings"] for run in runs}
    rows = [
        [task] + [", ".join(f"{key} {value:g}" for key, value in chosen.get((task, m), {}).items()) for m in names]
        for task in TASKS
        if any((task, m) in chosen for m in names)
    ]
    return _rows(["task", *names], rows)


def suite() -> str:
    """What the tasks are."""
    header = ["task", "kind", "half", "network", "data", "cases", "before the race"]
    rows = []
    for task in TASKS.values():
        phase = task.phase
        before = f"{'Adam' if phase.optimizer == 'adam' else 'SGD'} {phase.lr:g}, {phase.epochs} epochs"
        before += " (decayed)" if phase.decay else ""
        half = "tuning" if task.tuning else "held out"
        rows.append([task.name, task.kind, half, task.what, task.data, str(task.cases), before])
    return _rows(header, rows)


def peers() -> str:
    """Hessian-vector products in gradients, beside the peers'."""
    results = _load("peers")
    names = list(results["products"][0]["ratios"])
    rows = [
        [row["case"], str(row["micro_batches"]), *(f"{row['ratios'][name]:.2f}" for name in names)]
        for row in results["products"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in results["peers"].items())
    return _rows(["network", "micro-batches", *names], rows) + f"\n{versions}.\n" + _measured(results, _PEERS)


def peer_spectra() -> str:
    """Ten leading eigenvalues and the smallest one, beside the peers'."""
    rows = [
        [
            row["method"],
            "" if row["products"] is None else str(row["products"]),
            f"{row['gradients']:.0f}",
            f"{row['largest_right_in_order']} of 10",
            "" if row["smallest_error"] is None else f"{row['smallest_error']:.0e}",
        ]
        for row in _load("peers")["spectra"]
    ]
    return _rows(["method", "products", "cost in gradients", "largest right in order", "smallest: error"], rows)


def engine(part: str) -> str:
    """One part of what the second-order engine costs."""
    results = _load("engine")
    note = _measured({"conditions": results["measured"][part]}, f"python benchmarks/engine.py --only {part}")
    return _rows(*ENGINE[part](results[part])) + note


_PEERS = "make bench-peers"
_ROUNDED = "python benchmarks/rounded_products.py"
_SECANTS = "python benchmarks/race.py --name race_secants --seeds 3 --seconds 8 --methods subspaces default"
_PROBES = (
    "python benchmarks/race.py --name race_probes --seeds 3 --seconds 12 --methods factors default "
    '"factors turns" turns --tasks "lstm by heart" "gru by heart" symmetric "mnist escape" narrow "ptb tanh"'
)

TABLES: dict[str, Callable[[], str]] = {
    "escape": escape,
    "stall": stall,
    "plateau": plateau,
    "accuracy": accuracy,
    "basis": basis,
    "scale": scale,
    "paper": paper,
    "suite": suite,
    "race_tuning": partial(race, tuning=True),
    "race_held_out": partial(race, tuning=False),
    "race_probes": partial(race, tuning=None, name="race_probes", command=_PROBES),
    "race_secants": partial(race, tuning=None, name="race_secants", command=_SECANTS),
    "targets_tuning": partial(targets, tuning=True),
    "targets_held_out": partial(targets, tuning=False),
    "searched": searched,
    "accelerator": accelerator,
    "rounded_spectra": rounded_spectra,
    "rounded_steps": rounded_steps,
    "peers": peers,
    "peer_spectra": peer_spectra,
}
TABLES |= {name: partial(claims, name) for name in FIGURES}
TABLES |= {f"engine_{part}": partial(engine, part) for part in ENGINE}


if __name__ == "__main__":
    sys.exit(main())
