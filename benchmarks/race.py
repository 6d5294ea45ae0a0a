"""Every method on every task of the suite, each with the same seconds from the same start.

    python benchmarks/race.py [--seeds 5] [--seconds 5] [--tasks NAME ...] [--methods NAME ...] [--data FOLDER]
        [--device cuda]

Seconds are those of one thread of this process (on a CUDA device those of the clock, with the device waited for),
evaluations of the full training loss left out. A step that ends after the budget does not count. Starts are reached on
the CPU, so that they are the same everywhere. The settings of SGD, Adam, Hessian-free, scipy's and K-FAC are searched
for each task first, on a seed that does not race, with a third of the budget for each setting. Every result is written
at once to `benchmarks/results/race.json` (searches: `race_search.json`; of a CUDA device: `race_cuda.json` and so on),
and what is there is not run again, so the race can be interrupted and continued. Tasks whose data set is not there are
left out.
`--quick` is a rehearsal on tiny tasks.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from engine_parts.timing import now
from suite.methods import METHODS, OURS, RIVALS, SEARCHED, at_edge
from suite.tasks import EVERY, STARTS, TASKS, Problem, Task
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from lightning_sfn.experiments.conditions import conditions

DATA = Path(__file__).parents[2] / "shared" / "data"
SEARCH_SEED = 1000
CPU = torch.device("cpu")
_QUICK_SECONDS = 0.2
_POINTS = 12  # of a loss curve


class _AbsentError(Exception):
    """The data set of a task is not there."""


@dataclass(frozen=True)
class Course:
    """Where and for how long methods race.

    Attributes:
        seconds: Budget of one run.
        data: Folder of the data sets that are not embedded.
        results: Folder of the results files.
        starts: Folder of the starts.
        name: Name of the results file.
        device: Where methods run.
    """

    seconds: float
    data: Path = DATA
    results: Path = record.RESULTS
    starts: Path = STARTS
    name: str = "race"
    device: torch.device = CPU

    def load(self, name: str) -> list[dict[str, Any]]:
        """The runs of a results file."""
        path = self.results / f"{name}.json"
        return list(json.loads(path.read_text())["runs"]) if path.exists() else []

    def append(self, name: str, run: dict[str, Any]) -> None:
        """Adds a run to a results file, with the date and versions it ran under."""
        where = {key: conditions()[key] for key in ("date", "lightning_sfn", "processor")}
        where["processor"] = record.processor_of(self.device) or where["processor"]
        with record.alone(self.results):
            record.write(name, {"runs": [*self.load(name), run | where]}, folder=self.results)


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", choices=EVERY, default=list(TASKS), metavar="NAME", help="the suite by default"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*RIVALS, *OURS], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0")
    parser.add_argument("--seconds", type=float, default=5.0, help="processor time of each run (5)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10 and ptb")
    parser.add_argument("--name", default="race", help="name of the results file")
    record.add_device(parser)
    parser.add_argument("--quick", action="store_true", help="tiny tasks and budgets, results thrown away")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = options.device
    if not options.quick:
        course = Course(options.seconds, options.data, name=record.named(options.name, device), device=device)
        race(course, options.tasks, options.methods, options.seeds)
        return
    with tempfile.TemporaryDirectory() as folder:
        course = Course(_QUICK_SECONDS, options.data, Path(folder), Path(folder), device=device)
        race(course, options.tasks, options.methods, 1, tiny=True)


def race(course: Course, tasks: list[str], methods: list[str], seeds: int, *, tiny: bool = False) -> int:
    """Runs what is missing, all tasks with the first seed first; returns how many tasks could not run."""
    done = {_key(run) for run in course.load(course.name)}
    jobs = [(seed, task, method) for seed in range(seeds) for task in tasks for method in methods]
    absent: dict[str, str] = {}
    warned: set[tuple[str, str]] = set()
    with tqdm([job for job in jobs if (*job, course.seconds) not in done], desc="race") as bar:
        for seed, name, method in bar:
            bar.set_postfix_str(f"{name}, {method}, seed {seed}")
            task = EVERY[name].tiny() if tiny else EVERY[name]
            if name in absent:
                continue
            try:
                settings = search(course, task, method)
                if (edges := at_edge(method, settings)) and (name, method) not in warned:
                    warned.add((name, method))
                    tqdm.write(
                        f"{name}, {method}: the best {' and '.join(edges)} lies at the edge of what is searched."
                    )
                run = measure(course, task, method, seed, settings, course.seconds)
            except _AbsentError as error:
                absent[name] = str(error)
                continue
            course.append(course.name, run)
    for name, reason in absent.items():
        print(f"{name} was left out. {reason}", file=sys.stderr)
    return len(absent)


def search(course: Course, task: Task, method: str) -> dict[str, Any]:
    """The settings that reach the lowest loss in a third of the budget, on a seed that does not race."""
    candidates = SEARCHED.get(method, [{}])
    if len(candidates) == 1:
        return candidates[0]
    seconds = course.seconds / 3
    runs = course.load(f"{course.name}_search")
    known = {json.dumps(run["settings"]): run for run in runs if _same(run, task, method, seconds)}
    for settings in candidates:
        if json.dumps(settings) not in known:
            run = measure(course, task, method, SEARCH_SEED, settings, seconds)
            course.append(f"{course.name}_search", run)
            known[json.dumps(settings)] = run
    return min(candidates, key=lambda s: _or_infinity(known[json.dumps(s)]["final"]))


def measure(
    course: Course, task: Task, method: str, seed: int, settings: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """One run: its start, its end, and the curve between."""
    try:
        problem = task.start(seed, course.data, course.starts).to(course.device)
    except FileNotFoundError as error:
        raise _AbsentError(str(error)) from error
    if course.device.type == "cuda":  # what a process loads once is nobody's time
        next(METHODS[method](copy.deepcopy(problem), **settings))
    torch.manual_seed(seed)
    before = _loss(problem)
    curve, steps, spent, error = [[0.0, before]], 0, 0.0, None
    due = seconds / _POINTS
    origin = end = parameters_to_vector(problem.model.parameters()).detach().clone()
    stepping = METHODS[method](problem, **settings)
    while spent < seconds:
        begun = now(course.device)
        try:
            next(stepping)
        except StopIteration:  # it can do no more
            break
        except (FloatingPointError, torch.linalg.LinAlgError) as failure:  # it diverged: that is its result
            error = str(failure)
            break
        spent += now(course.device) - begun
        if spent > seconds:
            break
        steps += 1
        end = parameters_to_vector(problem.model.parameters()).detach().clone()
        if spent >= due:
            curve.append([spent, _loss(problem)])
            due = (math.floor(spent * _POINTS / seconds) + 1) * seconds / _POINTS
    vector_to_parameters(end, problem.model.parameters())
    final = None if error else _loss(problem)
    return {
        "task": task.name,
        "method": method,
        "seed": seed,
        "seconds": seconds,
        "settings": settings,
        "start": before,
        "final": final,
        "steps": steps,
        "moved": float((end - origin).norm()),
        "curve": curve,
        "error": error,
    }


def _loss(problem: Problem) -> float | None:
    """The full training loss; None where it is not finite."""
    with torch.no_grad():
        loss = float(problem.loss())
    return loss if math.isfinite(loss) else None


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _key(run: dict[str, Any]) -> tuple[int, str, str, float]:
    return run["seed"], run["task"], run["method"], run["seconds"]


def _same(run: dict[str, Any], task: Task, method: str, seconds: float) -> bool:
    of_task = run["task"] == task.name and run["method"] == method
    return bool(of_task and math.isclose(run["seconds"], seconds, rel_tol=1e-4))  # files hold six digits


if __name__ == "__main__":
    main()
