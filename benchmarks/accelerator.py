"""What was measured on the CPU beside the same on a CUDA device; cells of what was not measured are empty."""

from collections.abc import Callable
from typing import Any

from suite.standings import JUDGED, KFAC_TARGET, standings
from suite.tasks import TASKS

Results = dict[str, Any]
Load = Callable[[str], Results | None]
Figures = dict[str, tuple[str, str]]
"""What was measured, with its target, by what it is."""


def compared(load: Load) -> list[tuple[str, str, str, str]]:
    """What is measured, its target, and the figures of the CPU and of the CUDA device.

    Args:
        load: Gives the results of a name; ``None`` where there are none.
    """
    rows = []
    for name, figures in (("engine", engine), ("rounded_products", rounded), ("race", race)):
        on_cpu, on_cuda = (figures(found) if found else {} for found in (load(name), load(f"{name}_cuda")))
        for what in on_cpu | on_cuda:
            target = (on_cpu | on_cuda)[what][1]
            rows.append((what, target, *(side[what][0] if what in side else "" for side in (on_cpu, on_cuda))))
    return rows


def engine(found: Results) -> Figures:
    """Figures of `engine.py`, each with its target."""
    figures: Figures = {}
    for row in found.get("products", []):
        case = f"{row['case']}, {row['micro_batches']} micro-batches"
        figures[f"product / gradient: {case}"] = f"{row['ratio']:.2f}", f"<= {row['target']:g}"
        if "ratio_captured" in row:
            figures[f"derived anew in one CUDA graph / gradient: {case}"] = f"{row['ratio_captured']:.2f}", ""
    if "spectrum" in found:
        last = found["spectrum"]["rows"][-1]
        right = last["right"] == last["asked"] and last["smallest_right"]
        cost = f"{last['gradients']:.0f}" + ("" if right else ", not all right")
        what = f"{last['asked']} largest and the smallest eigenvalue, in gradients"
        figures[what] = cost, f"<= {found['spectrum']['target']}"
    if "basis" in found:
        straight, longest = found["basis"]["orthogonality"], found["basis"]["time"][-1]
        figures["largest entry of VV' - 1"] = f"{straight['deviation']:.1e}", f"<= {straight['target']:g}"
        what = f"{longest['basis']} vectors, {longest['cases']} images: all / products"
        figures[what] = f"{longest['ratio']:.2f}", f"<= {longest['target']:g}"
        for row in found["basis"]["waits"]:
            figures[f"waits for the device, {row['basis']} vectors"] = str(row["waits"]), ""
    for row in found.get("steps", []):
        for part, bound in row["targets"].items():
            what = f"{part} in a step, {row['where']}, {row['coordinates']}"
            figures[what] = f"{row['shares'][part]:.1%}", f"< {bound:.0%}"
    return figures


def rounded(found: Results) -> Figures:
    """Figures of `rounded_products.py`."""
    return {
        f"smallest Ritz value with TF32 (CPU: simulated), relative error: {row['task']}": (
            f"{row['smallest_errors'][0]:.0e}",
            "",
        )
        for row in found["spectra"]
        if row["format"] == "tf32"
    }


def race(found: Results) -> Figures:
    """Figures of the race on the held-out half."""
    figures: Figures = {}
    kinds = {task.name: task.kind for task in TASKS.values() if not task.tuning}
    seconds = found["runs"][0]["seconds"]
    for row in standings(found["runs"], kinds):
        if not row.is_judged:
            continue
        what = "loss / Adam's" if row.kind == "escape" else "decrease / that of the best of SGD, Adam and L-BFGS"
        course = f"{row.task}, {seconds:g} s"
        figures[f"{course}: {what}"] = f"{row.against(JUDGED)[1]:.2f}", row.wanted
        figures[f"{course}: decrease / K-FAC's"] = f"{row.against_kfac(JUDGED):.2f}", f">= {KFAC_TARGET}"
    return figures
