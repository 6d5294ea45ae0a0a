"""``lightning-sfn reproduce``: one command for each figure of the paper."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn.experiments.classified import HUB_IDS
from lightning_sfn.experiments.conditions import conditions, rounded
from lightning_sfn.experiments.figure import Context, Figure, Sources, save_picture
from lightning_sfn.experiments.runner import Result, Runner, write_atomically
from lightning_sfn.experiments.sources import INSTALL, SAMPLE, require_packages

__all__ = ["FIGURES", "find_figure", "main", "reproduce"]

FIGURES = {
    "fig1": "lightning_sfn.experiments.figure1",
    "fig2": "lightning_sfn.experiments.figure2",
    "fig3": "lightning_sfn.experiments.figure3",
    "fig4": "lightning_sfn.experiments.figure4",
}
"""Modules of the figures, each with a `Figure` of the name ``FIGURE``."""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: What follows ``reproduce`` on the command line.

    Raises:
        argparse.ArgumentError: The command line is wrong.
        MisconfigurationException: Data or the output folder will not do.
    """
    options = _parser().parse_args(list(arguments))
    reproduce(
        options.figure,
        scale=options.scale,
        output=options.output,
        seeds=options.seeds,
        sources=_sources(options),
        overwrite=options.overwrite,
        processes=options.processes,
        device=options.device,
        progress=options.progress,
    )


def find_figure(name: str) -> Figure:
    """Look a figure up.

    Returns:
        The figure.

    Raises:
        MisconfigurationException: There is none of that name.
    """
    if name not in FIGURES:
        close = get_close_matches(name, FIGURES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise MisconfigurationException(f"There is no figure {name!r}, but {', '.join(FIGURES)}{hint}")
    figure: Figure = import_module(FIGURES[name]).FIGURE
    return figure


def reproduce(
    name: str,
    *,
    scale: str,
    output: Path | None,
    seeds: int | None,
    sources: Sources,
    overwrite: bool = False,
    processes: int = 1,
    device: str = "cpu",
    progress: bool = True,
    settings: Any = None,
) -> Result:
    """Measure a figure, write its numbers and pictures, and show the verdicts.

    Args:
        name: A key of `FIGURES`.
        scale: ``"small"`` or ``"paper"``.
        output: Where to write; ``runs/paper/NAME-SCALE`` if None.
        seeds: Number of seeds; the scale's own if None.
        sources: Where the data come from.
        overwrite: Whether what an earlier run left in the folder is deleted first.
        processes: Jobs done at the same time.
        device: Where to compute.
        progress: Whether to show a progress bar.
        settings: Other settings than the scale's.

    Returns:
        What was written as JSON.

    Raises:
        MisconfigurationException: An argument, the data or the output folder will not do.
    """
    figure = find_figure(name)
    count = figure.seeds[scale] if seeds is None else seeds
    if count < 1 or processes < 1:
        raise MisconfigurationException(f"{count} seeds and {processes} processes were asked for, but 1 is the least.")
    _require_device(device)
    _require_matplotlib()
    require_packages()
    settings = figure.scales[scale] if settings is None else settings
    used = {key: getattr(sources, key) for key in figure.data}
    fingerprint = {"figure": name, "scale": scale, "settings": asdict(settings), "sources": used, "device": device}
    fingerprint |= {key: conditions()[key] for key in ("lightning_sfn", "torch")}
    folder = Path("runs") / "paper" / f"{name}-{scale}" if output is None else output
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if scale == "small" else threads)
    try:
        runner = Runner(folder, fingerprint, overwrite=overwrite, processes=processes, progress=progress)
        result = figure.measure(settings, Context(runner, sources, range(count), device))
        whole = _whole(figure, fingerprint, count, result)
    finally:
        torch.set_num_threads(threads)
    _write(figure, whole, folder)
    if progress:
        _show(figure, whole, folder)
    return whole


def _require_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise MisconfigurationException(
            f"The device {device!r} cannot be used here ({reason}): give another one, such as cpu."
        ) from error


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise MisconfigurationException(f"The pictures need matplotlib, which is not installed: {INSTALL}.")


def _whole(figure: Figure, fingerprint: Result, seeds: int, result: Result) -> Result:
    command = f"lightning-sfn reproduce {figure.name} --scale {fingerprint['scale']} --seeds {seeds}"
    usual = _usual_sources(fingerprint["scale"])
    given = {key: value for key, value in fingerprint["sources"].items() if value not in (usual[key], None)}
    if fingerprint["device"] != "cpu":
        given["device"] = fingerprint["device"]
    # Folders are this machine's own affair; the name says which data were used.
    shown = {key: Path(value).name if Path(value).exists() else value for key, value in given.items()}
    return {
        "conditions": conditions(),
        "command": " ".join([command, *(f"--{key} {value}" for key, value in shown.items())]),
        "device": fingerprint["device"],
        "title": figure.title,
        "caption": figure.caption,
        "settings": fingerprint["settings"],
        "seeds": seeds,
        "verdicts": [asdict(verdict) for verdict in figure.verdicts(result)],
        "result": result,
    }


def _write(figure: Figure, whole: Result, folder: Path) -> None:
    """JSON last: where it is, everything else is too."""
    for name, canvas in figure.draw(whole["result"]).items():
        save_picture(canvas, folder / name)
    table = figure.rows(whole["result"])
    columns = list(dict.fromkeys(column for row in table for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomically(folder / f"{figure.name}.csv", text.getvalue())
    write_atomically(folder / f"{figure.name}.json", json.dumps(rounded(whole), indent=None) + "\n")


def _show(figure: Figure, whole: Result, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "measured", "verdict", title=f"{figure.name}: {figure.title}", show_lines=True)
    for verdict in whole["verdicts"]:
        table.add_row(verdict["claim"], verdict["measured"], verdict["verdict"])
    console = Console()
    console.print(table)
    console.print(f"Numbers and pictures: {folder}", highlight=False, soft_wrap=True)


def _sources(options: argparse.Namespace) -> Sources:
    """What was given; else the embedded samples, or at the paper's scale the Hub's images."""
    usual = _usual_sources(options.scale)
    return Sources(**{name: getattr(options, name) or value for name, value in usual.items()})


def _usual_sources(scale: str) -> dict[str, Any]:
    images = HUB_IDS if scale == "paper" else {"mnist": SAMPLE, "cifar10": None}
    return {**images, "text": SAMPLE}


class _Parser(argparse.ArgumentParser):
    """Raises where argparse prints its whole usage and exits: not all versions of Python heed ``exit_on_error``."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightning-sfn reproduce",
        description="Repeat a figure of the paper: numbers (JSON, CSV), pictures (PNG, PDF) and verdicts.",
        exit_on_error=False,
    )
    parser.add_argument("figure", type=_figure_name, help=f"one of {', '.join(FIGURES)}")
    parser.add_argument(
        "--scale", choices=("small", "paper"), default="small", help="minutes on two cores, or as printed"
    )
    parser.add_argument("--output", type=Path, help="folder; a run with the same settings goes on where it was")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--mnist", help="source of MNIST: a folder, a parquet file or a Hub id (small: the sample)")
    parser.add_argument("--cifar10", help="source of CIFAR-10; without one, the small scale leaves its panels out")
    parser.add_argument("--text", help="source of text: a text file, a folder or a Hub id (default: tiny Shakespeare)")
    parser.add_argument("--processes", type=int, default=1, help="jobs at the same time")
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run's results in the folder first")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show neither bar nor table")
    return parser


def _figure_name(name: str) -> str:
    try:
        find_figure(name)
    except MisconfigurationException as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name
