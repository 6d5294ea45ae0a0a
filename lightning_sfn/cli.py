"""The command ``lightning-sfn``: Lightning's own command line with this package's classes and recipes.

``lightning-sfn fit -c autoencoder`` trains from a recipe, ``lightning-sfn fit --help`` lists everything that can be
set. ``lightning-sfn reproduce fig1`` repeats a figure of the paper. Mistakes end in one sentence on standard
error: exit status 2 for the command line or the recipe, 1 for what turned out while running.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

# The parser knows a class by its short name once the class is imported; that is what most of these imports are for.
from lightning_sfn import HessianSpectrum, SaddleFreeNewton, SwitchToSFN
from lightning_sfn.cli_messages import one_sentence
from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.classified import ClassifiedImages
from lightning_sfn.experiments.mnist import MNISTDataModule
from lightning_sfn.experiments.perceptron import Perceptron
from lightning_sfn.experiments.recipes import with_recipe_paths
from lightning_sfn.experiments.recurrent import CharacterRNN
from lightning_sfn.experiments.sources import INSTALL
from lightning_sfn.experiments.text import CharacterText
from lightning_sfn.newton import CurvatureError, ObjectiveError, Spectrum
from lightning_sfn.newton.processes import ProcessError
from lightning_sfn.trainer.inspection import InspectingTrainer, OptionError
from lightning_sfn.version import __version__

__all__ = [
    "Autoencoder",
    "CharacterRNN",
    "CharacterText",
    "ClassifiedImages",
    "HessianSpectrum",
    "MNISTDataModule",
    "Perceptron",
    "SaddleFreeNewton",
    "SwitchToSFN",
    "TensorBoardLogger",
    "__version__",
    "main",
    "run",
]

_NEEDED = ("jsonargparse", "docstring_parser", "typeshed_client", "rich")
_OWN_COMMANDS = {"reproduce": "lightning_sfn.experiments.reproduce"}  # each module has a main(arguments)
_RUNTIME_ERRORS = (
    MisconfigurationException,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ObjectiveError,
    CurvatureError,
    FloatingPointError,
    ProcessError,
)
_USAGE_ERROR = 2
_RUNTIME_ERROR = 1
_SHOWN = 5  # eigenvalues of each end in the table


class UsageError(Exception):
    """The command line or the recipe asks for something that cannot be built."""


class SFNCommand(LightningCLI):
    """Lightning's command line, with recipes' mistakes as `UsageError` and a hint at TensorBoard after ``fit``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a recipe can set beside trainer, model and data."""
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="CPU threads for torch. Layers of a few hundred units are fastest with 1; left out, torch decides.",
        )

    def before_instantiate_classes(self) -> None:
        """Apply the number of threads before anything computes.

        Raises:
            UsageError: If it is not positive.
        """
        threads = self._get(self.config, "threads")
        if threads is None:
            return
        if threads < 1:
            raise UsageError(f"threads is {threads}, but a positive number of CPU threads is expected.")
        torch.set_num_threads(threads)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data.

        Raises:
            UsageError: If one of them rejects its arguments.
        """
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            raise UsageError(one_sentence(str(error))) from error

    def _parse_ckpt_path(self) -> None:
        """Read the options that a checkpoint holds, and refuse a file that is none."""
        try:
            super()._parse_ckpt_path()
        except argparse.ArgumentError:
            raise
        except Exception as error:  # whatever unpickling makes of a file that is none
            path = self.config[self.config.subcommand].ckpt_path
            raise MisconfigurationException(
                f"{path} is not a checkpoint that can be read: give one that trainer.save_checkpoint or "
                "ModelCheckpoint made, with plain data in it. "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """List the subcommands, and their arguments that come from elsewhere."""
        return {**LightningCLI.subcommands(), "spectrum": {"model", "train_dataloaders", "datamodule"}}

    def spectrum(self, **options: Any) -> None:
        """Take the spectrum, and print it as a table with what it means."""
        trainer = cast(InspectingTrainer, self.trainer)
        spectrum = trainer.spectrum(**options)
        if spectrum is not None and trainer.is_global_zero:
            _print_spectrum(spectrum, trainer.verdict)

    def after_fit(self) -> None:
        """Say how to look at the curves, once, where they were written for TensorBoard."""
        if not self.trainer.is_global_zero:
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _print_hint(Path(logger.log_dir).parent)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: Arguments without the program's name; None takes them from ``sys.argv``, where recipe names are then
            replaced by paths, so that processes which Lightning starts with the same command line find them too.

    Returns:
        Exit status: 0 on success, 2 for a mistake in the command line or the recipe, 1 for one found while running.
    """
    # Lightning 2.6 asks torch 2.13 a deprecated question about every batch.
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\). is deprecated", FutureWarning)
    try:
        _require_extras()
        arguments = list(sys.argv[1:] if args is None else args)
        if args is None:
            _see_working_directory()
        if arguments == ["--version"]:
            sys.stdout.write(f"lightning-sfn {__version__}\n")
            return 0
        _require_command(arguments)
        if arguments[0] in _OWN_COMMANDS:
            import_module(_OWN_COMMANDS[arguments[0]]).main(arguments[1:])
            return 0
        arguments = _with_recipes(arguments)
        if args is None:
            sys.argv[1:] = arguments
        run(None if args is None else arguments)
    except argparse.ArgumentError as error:
        return _fail(one_sentence(str(error)), _USAGE_ERROR)
    except (UsageError, OptionError) as error:
        return _fail(str(error), _USAGE_ERROR)
    except _RUNTIME_ERRORS as error:
        return _fail(_runtime_sentence(error), _RUNTIME_ERROR)
    return 0


def _runtime_sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}."
    return " ".join(str(error).split())


def _see_working_directory() -> None:
    """Let a recipe name classes in modules of the working directory, as ``python -m`` does and a script does not."""
    if os.getcwd() not in sys.path and not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.getcwd())


def _require_command(arguments: list[str]) -> None:
    known = [*SFNCommand.subcommands(), *_OWN_COMMANDS]
    names = ", ".join(known)
    if not arguments:
        raise UsageError(f"a command is expected, one of {names}; each has its own --help.")
    if not arguments[0].startswith("-") and arguments[0] not in known:
        raise UsageError(f"there is no command {arguments[0]!r}: choose one of {names}.")


def _with_recipes(arguments: list[str]) -> list[str]:
    try:
        return with_recipe_paths(arguments)
    except MisconfigurationException as error:
        raise UsageError(str(error)) from error


def run(arguments: list[str] | None) -> SFNCommand:
    """Run the command without turning errors into exit statuses.

    Args:
        arguments: Arguments without the program's name; None takes them from ``sys.argv``.

    Returns:
        The finished command, with its ``trainer``, ``model`` and ``datamodule``.
    """
    raising = {"exit_on_error": False}  # the default prints the whole usage before the error
    own = ", ".join(_OWN_COMMANDS)
    epilog = f"Beside Lightning's subcommands: {own} (each has its own --help). --version prints the version."
    parser_kwargs: dict[str, Any] = {
        **raising,
        "epilog": epilog,
        **{name: dict(raising) for name in SFNCommand.subcommands()},
    }
    return SFNCommand(
        args=arguments,
        trainer_class=InspectingTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs=parser_kwargs,
    )


def _require_extras() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"The command needs packages that are not installed ({', '.join(missing)}): {INSTALL}.")


def _print_hint(folder: Path) -> None:
    from rich.console import Console

    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    Console().print(f"Curves and spectra: [bold]tensorboard --logdir {shown}[/bold]", highlight=False, soft_wrap=True)


def _print_spectrum(spectrum: Spectrum, words: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "value", "error bound", title="Spectrum", title_justify="left")
    ends = spectrum.extremes(_SHOWN, _SHOWN)
    for name, value, bound in ends:
        table.add_row(name, f"{value:.6g}", f"{bound:.1g}")
    table.add_section()
    table.add_row("loss", f"{spectrum.loss:.6g}")
    table.add_row("gradient norm", f"{spectrum.gradient_norm:.4g}")
    table.add_row(f"negative among {len(spectrum.eigenvalues)} Ritz values", f"{spectrum.negative_fraction:.1%}")
    if spectrum.density is not None:
        share, error = spectrum.density.below(0.0)
        trace, trace_error = spectrum.density.trace
        known = f"{error:.1%}" if error < 1 else "not known"
        table.add_row(f"negative among all {spectrum.size} (density)", f"{share:.1%}", known)
        table.add_row("trace (density)", f"{trace:.4g}", f"{trace_error:.2g}")
    table.add_row("Hessian-vector products", f"{spectrum.products}")
    if spectrum.converged is not None:
        table.add_row("converged", "yes" if spectrum.converged else "no")
    console = Console()
    console.print(table)
    console.print(words, highlight=False, soft_wrap=True)


def _fail(sentence: str, status: int) -> int:
    sys.stderr.write(f"lightning-sfn: {sentence}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
