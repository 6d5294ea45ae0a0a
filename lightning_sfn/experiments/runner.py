"""Seeded jobs whose results stay: an interrupted run goes on where it was, and nothing half-written counts."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

__all__ = ["Job", "Result", "Runner", "write_atomically"]

Result = dict[str, Any]
"""What a job returns: names to numbers, strings, lists and dictionaries of them."""

_SETTINGS = "settings.json"
_JOBS = "jobs"
_NOTHING = object()
_VERSIONS = frozenset({"lightning_sfn", "torch"})


@dataclass(frozen=True)
class Job:
    """One piece of work that can be done alone, in a process of its own.

    Attributes:
        name: Its name within the run, also that of its file.
        work: A function at the top of a module, so that another process can import it.
        arguments: Keyword arguments that can be pickled.
    """

    name: str
    work: Callable[..., Result]
    arguments: dict[str, Any] = field(default_factory=dict)


class Runner:
    """Does jobs and keeps each result in a file of its own.

    The folder belongs to one set of settings. A run with the same settings takes up what is there; other settings are
    refused, because their numbers would be mixed.

    Args:
        folder: Where results go; made if it does not exist.
        settings: What the numbers depend on; ``figure`` names the results files. The number of seeds is no part of it:
            a run can be extended.
        overwrite: Whether what an earlier run left in the folder is deleted first. Foreign files stay.
        processes: Jobs done at the same time.
        progress: Whether to show a progress bar.

    Raises:
        MisconfigurationException: The folder holds another run or foreign files.
    """

    def __init__(
        self, folder: Path, settings: Result, *, overwrite: bool = False, processes: int = 1, progress: bool = True
    ) -> None:
        self.folder = folder
        self._processes = processes
        self._progress = progress
        self._claim(settings, overwrite)

    def _claim(self, settings: Result, overwrite: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MisconfigurationException(
                f"The output {str(self.folder)!r} cannot be a folder ({error.strerror}): give another one."
            ) from error
        wanted = json.loads(json.dumps(settings))
        found = _read(self.folder / _SETTINGS)
        # Files with a dot in front are the system's, or what a killed process left of an atomic write.
        held = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        if held and not (isinstance(found, dict) and wanted.keys() - _VERSIONS <= found.keys()):
            raise MisconfigurationException(
                f"The output folder {str(self.folder)!r} holds files without the settings of a run beside them: give "
                "another folder, or delete them yourself."
            )
        if held and found != wanted and not overwrite:
            raise MisconfigurationException(
                f"The output folder {str(self.folder)!r} belongs to a run {_difference(found, wanted)}: give another "
                "folder, or --overwrite to delete its results."
            )
        if held and overwrite:
            self._delete([str(run.get("figure")) for run in (found, wanted)])
        write_atomically(self.folder / _SETTINGS, json.dumps(wanted, indent=1))
        (self.folder / _JOBS).mkdir(exist_ok=True)

    def _delete(self, figures: Sequence[str]) -> None:
        """Deletes what runs of these figures left, and nothing else."""
        shutil.rmtree(self.folder / _JOBS, ignore_errors=True)
        written = re.compile(rf"({'|'.join(map(re.escape, figures))})(_\w+)?\.(json|csv|png|pdf)")
        for path in list(self.folder.iterdir()):
            if path.is_file() and written.fullmatch(path.name):
                path.unlink()

    def run(self, jobs: Sequence[Job], title: str) -> dict[str, Result]:
        """Does what has not been done yet.

        Args:
            jobs: The jobs; their names are unique.
            title: What the progress bar says.

        Returns:
            The results by name, in the order of the jobs.
        """
        results = {job.name: found for job in jobs if (found := _read(self._file(job.name))) is not None}
        missing = [job for job in jobs if job.name not in results]
        with _bar(title, len(jobs), len(results), self._progress) as advance:
            for name, result in self._work_off(missing):
                write_atomically(self._file(name), json.dumps(result))
                results[name] = json.loads(json.dumps(result))
                advance()
        return {job.name: results[job.name] for job in jobs}

    def _work_off(self, jobs: Sequence[Job]) -> Iterator[tuple[str, Result]]:
        if self._processes == 1 or len(jobs) <= 1:
            for job in jobs:
                yield job.name, job.work(**job.arguments)
            return
        # A fresh interpreter for each worker: forked ones inherit locks of torch's threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._processes, context, initializer=_use_one_thread) as pool:
            waiting = {pool.submit(job.work, **job.arguments): job.name for job in jobs}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _file(self, name: str) -> Path:
        return self.folder / _JOBS / f"{name}.json"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def _read(path: Path) -> Any:
    """A JSON file's content; ``None`` where there is none or it was damaged, so that the job is done again."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def _difference(found: Result, wanted: Result) -> str:
    """In what the settings of two runs differ first; what they ask for weighs more than the versions."""
    names = sorted({**found, **wanted}, key=_VERSIONS.__contains__)
    name = next(n for n in names if found.get(n, _NOTHING) != wanted.get(n, _NOTHING))
    there, here = found.get(name), wanted.get(name)
    if name in _VERSIONS:
        return f"under another version ({name} {there or 'unknown'} there and {here} here)"
    while isinstance(there, dict) and isinstance(here, dict):
        inner = next(n for n in {**there, **here} if there.get(n, _NOTHING) != here.get(n, _NOTHING))
        name, there, here = inner, there.get(inner), here.get(inner)
    return f"with other settings ({name} is {there!r} there and {here!r} here)"


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@contextmanager
def _bar(title: str, total: int, done: int, shown: bool) -> Iterator[Callable[[], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda: progress.advance(task)
