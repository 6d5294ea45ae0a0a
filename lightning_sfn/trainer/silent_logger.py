"""A stand-in for a logger in replays: it says where the logger writes, and writes nothing."""

from pathlib import PurePath
from typing import Any

from pytorch_lightning.loggers.logger import DummyLogger

__all__ = ["SilentLogger"]

_READ = (type(None), bool, int, float, str, PurePath)


def _passed(name: str) -> Any:
    """A property that is the logger's, or ``None`` where it has none of that name."""
    return property(lambda silent: getattr(silent._logger, name, None))


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

    name, version = _passed("name"), _passed("version")
    root_dir, log_dir, save_dir = _passed("root_dir"), _passed("log_dir"), _passed("save_dir")
    group_separator = _passed("group_separator")

    def __getattr__(self, name: str) -> Any:
        """Numbers, names and paths of the logger; anything else is a method that does nothing."""
        value = getattr(self._logger, name, self) if not name.startswith("__") else self
        return value if isinstance(value, _READ) else super().__getattr__(name)
