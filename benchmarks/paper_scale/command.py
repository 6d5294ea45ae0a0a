"""The command line: run, prepare, roofline, report."""

import argparse
import logging
import sys
from pathlib import Path

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from paper_scale.arms import Arms
from paper_scale.images import load_images, prepare
from paper_scale.pieces import Piece
from paper_scale.recurrent import RecurrentTask, load_windows
from paper_scale.report import write_report
from paper_scale.results import Results
from paper_scale.roofline import write_roofline
from paper_scale.settings import METHODS, SCALES, TASKS, Settings
from paper_scale.task import Task

__all__ = ["WORK_LEFT", "main"]

WORK_LEFT = 3
"""Exit status of a piece whose time was up before the work was done: call again."""

_LOG = logging.getLogger("paper_scale")
_RESULTS = "results.jsonl"


def main(words: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        words: The command line; that of the program if left out.

    Returns:
        Exit status: 0 when all is done, 3 when the piece is over and work is left, 2 for a mistake.
    """
    options = _parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        return int(options.subcommand(options))
    except (ValueError, OSError, MisconfigurationException) as error:
        _LOG.error("%s", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The paper's deep autoencoder at its own size, in resumable pieces.")
    commands = parser.add_subparsers(required=True, metavar="run | prepare | roofline | report")

    run = commands.add_parser("run", help="go on with the experiment for one piece of time")
    run.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    run.add_argument("--piece-seconds", type=float, default=540.0, help="wall-clock time of this piece")
    run.add_argument("--steps", type=int, help="steps of this piece at most (an epoch, or an outer step)")
    run.set_defaults(subcommand=_run)

    roofline = commands.add_parser("roofline", help="time the parts of a step against what the device can do")
    roofline.set_defaults(subcommand=_roofline)
    for command in (run, roofline):
        command.add_argument("--data", default="sample", help="tensor file, folder of parquet files, or 'sample'")
        command.add_argument(
            "--task", choices=TASKS, default=TASKS[0], help="recurrent: Figure 4 (c), --data a text folder"
        )
        command.add_argument("--scale", choices=("paper", "small"), help="paper on CUDA, small elsewhere, if left out")
        command.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings")
        command.add_argument("--device", choices=("cuda", "cpu"), help="CUDA where there is any, if left out")

    convert = commands.add_parser("prepare", help="write parquet files as one tensor file that needs torch alone")
    convert.add_argument("--data", required=True)
    convert.add_argument("--output", type=Path, default=Path("mnist.pt"))
    convert.set_defaults(subcommand=_prepare)

    report = commands.add_parser("report", help="tables, Figure 4 (a, b) and a summary from the results file")
    report.add_argument("--output", type=Path, help="of the summary, as JSON; summary.json in the folder if left out")
    report.set_defaults(subcommand=_report)
    for command in (run, roofline, report):
        command.add_argument("--folder", type=Path, default=Path("runs/paper_autoencoder"), help="of results")
    return parser


def _run(options: argparse.Namespace) -> int:
    task = _task(options)
    results = Results(options.folder / _RESULTS, task.settings, _device_name(task.device))
    piece = Piece(task, results, options.folder, seconds=options.piece_seconds, steps=options.steps)
    if Arms(task, results, tuple(name for name in METHODS if name in options.methods)).run(piece):
        _LOG.info("All is done: %s report --folder %s", Path(sys.argv[0]).name, options.folder)
        return 0
    _LOG.info("This piece is over and work is left: call again to go on.")
    return WORK_LEFT


def _roofline(options: argparse.Namespace) -> int:
    write_roofline(_task(options), options.folder / "roofline.json")
    return 0


def _prepare(options: argparse.Namespace) -> int:
    images = prepare(options.data, options.output)
    _LOG.info("%s holds %d training and %d test images.", options.output, *map(len, images.values()))
    return 0


def _report(options: argparse.Namespace) -> int:
    print(write_report(options.folder / _RESULTS, options.folder, options.output))
    return 0


def _task(options: argparse.Namespace) -> Task:
    device = _device(options.device)
    scale = options.scale or ("paper" if device.type == "cuda" else "small")
    settings = Settings.changed(SCALES[options.task, scale], options.set)
    torch.backends.cuda.matmul.allow_tf32 = settings.matmul == "tf32"
    if settings.task == "recurrent":
        return RecurrentTask.on(device, load_windows(options.data, cases=settings.cases), settings)
    return Task.on(device, load_images(options.data, side=settings.side, cases=settings.cases), settings)


def _device(asked: str | None) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: leave --device out to run at the small scale on the processor.")
    if asked is None and not torch.cuda.is_available():
        _LOG.warning("There is no CUDA device here: running on the processor, at the small scale unless --scale says.")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
