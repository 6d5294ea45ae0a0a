"""A stand-in for a logger in replays: it says where the logger writes, and writes nothing."""

from pathlib import PurePath
from typing import Any

from pytorch_lightning.loggers.logger import DummyLogger

__all__ = ["SilentLogger"]

_READ = (type(None), bool, int, float, str, PurePath)


class SilentLogger(DummyLogger):
    """Passes through what a step reads of a logger (paths, name, version), and swallows what it would write.

    It counts as an instance of the logger's class, since steps, and Lightning where it looks for a directory, ask.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The logger's class."""
        return type(self._logger)

    @property
    def name(self) -> Any:
        """The logger's name."""
        return self._logger.name

    @property
    def version(self) -> Any:
        """The logger's version."""
        return self._logger.version

    @property
    def root_dir(self) -> Any:
        """The logger's root directory, if it has one."""
        return self._read("root_dir")

    @property
    def log_dir(self) -> Any:
        """The logger's directory of this run, if it has one."""
        return self._read("log_dir")

    @property
    def save_dir(self) -> Any:
        """The logger's directory of all runs, if it has one."""
        return self._read("save_dir")

    @property
    def group_separator(self) -> Any:
        """What separates parts of names."""
        return self._logger.group_separator

    def __getattr__(self, name: str) -> Any:
        """Numbers, names and paths of the logger; anything else is a method that does nothing."""
        value = getattr(self._logger, name, self) if not name.startswith("__") else self
        return value if isinstance(value, _READ) else super().__getattr__(name)

    def _read(self, name: str) -> Any:
        return getattr(self._logger, name, None)
