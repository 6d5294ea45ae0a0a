"""Where the rows come from: one word in a recipe to one split of a ``datasets.Dataset``.

A source is ``sample`` (the rows that travel with the package), a path, or the id of a dataset on the Hugging Face Hub.
Whatever cannot be had is said in one sentence and at once: without a network the Hub client alone retries for more
than twenty seconds and then does not tell what to do.
"""

from __future__ import annotations

import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn.data import sample_folder

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = "sample"
"""The source name of the embedded rows."""

INSTALL = 'install the extra "all", by pip install ".[all]" in the repository'
"""What to do about a missing package."""

_NEEDED = {"datasets": "datasets", "pillow": "PIL"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_SUFFIXES = frozenset({".parquet", ".arrow", ".json", ".csv", ".txt", ".npz", ".gz", ".zip"})
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val")
_PROBE_SECONDS = 4.0


def load_split(source: str | Path, split: str, columns: Sequence[str] = ()) -> Dataset:
    """Load one split of a source.

    Args:
        source: ``"sample"`` for the embedded MNIST rows; or a path: a parquet file, a folder with ``{split}*.parquet``
            (also one level down, as in a downloaded copy of a Hub dataset), or a folder written by ``save_to_disk``; or
            a Hub id ``owner/name``. An existing path wins over a Hub id of the same spelling. Parquet files are read
            into memory and leave no cache behind. Of files called ``...-00000-of-00002`` all have to be there.
        split: Name of the split, such as ``"train"`` or ``"test"``. A parquet file stands for the split its name begins
            with (``train`` if its name says nothing); the other splits are looked for beside it.
        columns: Columns that the caller needs.

    Returns:
        The rows of the split, with the column types that the file or the Hub declares.

    Raises:
        MisconfigurationException: If the source, the split or a column does not exist, or if a Hub id is neither cached
            nor reachable. One sentence each.
    """
    require_packages()
    dataset = _resolve(str(source), split)
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise MisconfigurationException(
            f"The data source {str(source)!r} has the columns {_listed(dataset.column_names)} in its split {split!r}, "
            f"but {_listed(missing)} is needed: rename the column or choose another source."
        )
    return dataset


def is_hub_id(source: str | Path) -> bool:
    """Tell whether a source is looked up on the Hugging Face Hub.

    Returns:
        True if nothing of that name exists on disk and the name has the form ``owner/name``.
    """
    text = str(source)
    if text == SAMPLE or Path(text).expanduser().exists():
        return False
    return _HUB_ID.fullmatch(text) is not None and Path(text).suffix.lower() not in _DATA_SUFFIXES


def _resolve(source: str, split: str) -> Dataset:
    if source == SAMPLE:
        return _from_folder(sample_folder(), split, source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, split, source)
    if path.is_file():
        return _from_file(path, split, source)
    if is_hub_id(source):
        return _from_hub(source, split)
    raise MisconfigurationException(
        f"The data source {source!r} does not exist: give an existing parquet file or folder, a Hub id of the form "
        f"'owner/name', or {SAMPLE!r} for the embedded MNIST rows."
    )


def _from_file(path: Path, split: str, source: str) -> Dataset:
    if path.suffix.lower() != ".parquet":
        raise MisconfigurationException(
            f"The data source {source!r} is a file of type {path.suffix or 'unknown'!r}, but only parquet files are "
            "read: convert it to parquet or give a folder written by save_to_disk."
        )
    own_split = next((name for name in _SPLIT_NAMES if path.stem.lower().startswith(name)), "train")
    if own_split == split:
        return _from_parquet([path], source)
    siblings = _parquet_files(path.parent, split, source)
    if siblings:
        return _from_parquet(siblings, source)
    raise MisconfigurationException(
        f"The data source {source!r} holds the split {own_split!r} only, but {split!r} is needed as well: put a file "
        f"'{split}.parquet' beside it and give the folder."
    )


def _from_folder(folder: Path, split: str, source: str) -> Dataset:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _from_saved(folder, split, source)
    files = _parquet_files(folder, split, source)
    if files:
        return _from_parquet(files, source)
    present = sorted(file.name for file in [*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])
    raise MisconfigurationException(
        f"The data source {source!r} has no split {split!r}: a folder with '{split}*.parquet' or one written by "
        f"save_to_disk was expected, and the parquet files found are {_listed(present) if present else 'none'}."
    )


def _parquet_files(folder: Path, split: str, source: str) -> list[Path]:
    pattern = f"{split}*.parquet"
    files = sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))
    _require_all_shards(files, source)
    return files


def _require_all_shards(files: Sequence[Path], source: str) -> None:
    """Refuse an interrupted download: files that call themselves one of several, without the others."""
    shards = {(file.parent, found[1], found[3]) for file in files if (found := _SHARD.fullmatch(file.stem))}
    for folder, name, count in shards:
        names = [f"{name}-{number:0{len(count)}}-of-{count}.parquet" for number in range(int(count))]
        missing = [file for file in names if folder / file not in files]
        if missing:
            raise MisconfigurationException(
                f"The data source {source!r} is incomplete: of {count.lstrip('0')} files {name!r} it lacks "
                f"{len(missing)}, the first {missing[0]!r}; get the rest."
            )


def _from_parquet(files: Sequence[Path], source: str) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        tables = [pyarrow.parquet.read_table(file, partitioning=None) for file in files]
        return Dataset(InMemoryTable(pyarrow.concat_tables(tables)))
    except (pyarrow.ArrowException, OSError) as error:
        raise MisconfigurationException(
            f"The data source {source!r} cannot be read as parquet ({_first_line(error)}): check that "
            f"{_listed([file.name for file in files])} is complete."
        ) from error


def _from_saved(folder: Path, split: str, source: str) -> Dataset:
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise MisconfigurationException(
            f"The data source {source!r} looks like a folder written by save_to_disk, but cannot be read "
            f"({_first_line(error)}): write it again."
        ) from error
    if not isinstance(loaded, Dataset):
        if split in loaded:
            return loaded[split]
        present = list(loaded)
    else:
        name = str(loaded.split or "train")
        if name == split:
            return loaded
        present = [name]
    raise MisconfigurationException(
        f"The data source {source!r} has the splits {_listed(present)}, but {split!r} is needed: save a DatasetDict "
        "with both to that folder, or give another source."
    )


def _from_hub(name: str, split: str) -> Dataset:
    from datasets import config, load_dataset

    cached = _from_cache(name, split)
    if cached is not None:
        return cached
    if config.HF_HUB_OFFLINE:
        raise MisconfigurationException(_unreachable(name, "offline mode is on (HF_HUB_OFFLINE)"))
    if not _hub_answers(config.HF_ENDPOINT):
        raise MisconfigurationException(_unreachable(name, "the Hub cannot be reached"))
    try:
        return load_dataset(name, split=split)
    except ConnectionError as error:
        raise MisconfigurationException(_unreachable(name, "the connection to the Hub failed")) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise MisconfigurationException(
            f"The Hub dataset {name!r} gives no split {split!r} ({_first_line(error)}): check the id and its splits, "
            f"or give a folder of parquet files, or {SAMPLE!r}."
        ) from error


def _from_cache(name: str, split: str) -> Dataset | None:
    """Take a Hub dataset from what is already on this machine, or return None.

    Two caches count: what ``load_dataset`` prepared earlier, and the files of ``hf download``.
    """
    from datasets import load_dataset
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _offline():
        try:
            return load_dataset(name, split=split)
        except (OSError, ValueError, RuntimeError):
            pass
    try:
        folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
        return _from_folder(Path(folder), split, name)
    except (LocalEntryNotFoundError, MisconfigurationException):
        return None


@contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` from asking the Hub, for the duration of the block."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _hub_answers(endpoint: str) -> bool:
    """Ask the Hub for a sign of life, once, and never for longer than `_PROBE_SECONDS`.

    The question runs in a thread because a name lookup has no timeout of its own.
    """
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            answered.set()  # a refusal is an answer
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                answered.set()  # the host is there; the Hub client may trust certificates that this request does not
        except OSError:
            pass
        else:
            answered.set()

    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def _unreachable(name: str, why: str) -> str:
    return (
        f"The data source {name!r} is neither a path here nor in the local cache, and {why}: give a folder or parquet "
        f"file made elsewhere (`hf download {name} --repo-type dataset --local-dir FOLDER`), use {SAMPLE!r}, or get "
        "online once to fill the cache."
    )


def require_packages() -> None:
    """Refuse to read data without the packages that reading takes.

    Raises:
        MisconfigurationException: One of them is not installed.
    """
    missing = [package for package, module in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise MisconfigurationException(
            f"Reading data needs packages that are not installed ({', '.join(missing)}): {INSTALL}."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
