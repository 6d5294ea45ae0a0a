"""Every kind of source delivers the same rows; every mistake is one sentence that says what to do."""

import shutil
import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn.experiments import sources
from lightning_sfn.experiments.sources import is_hub_id, load_split

HUB_ID = "somebody/something"


def small_dataset(rows: int, first: int = 0) -> Dataset:
    images = [PillowImage.new("L", (28, 28), first + row) for row in range(rows)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": images, "label": [row % 2 for row in range(rows)]}, features=features)


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "parquet"
    folder.mkdir()
    small_dataset(3).to_parquet(folder / "train-00000-of-00002.parquet")
    small_dataset(2, first=3).to_parquet(folder / "train-00001-of-00002.parquet")
    small_dataset(4, first=9).to_parquet(folder / "test.parquet")
    return folder


def grey_values(dataset: Dataset) -> list[int]:
    return [image.getpixel((0, 0)) for image in dataset[:]["image"]]


def sentence(info: pytest.ExceptionInfo[MisconfigurationException]) -> str:
    text = str(info.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_folder_of_parquet_files_joins_the_files_of_a_split_in_order(parquet_folder: Path) -> None:
    train = load_split(parquet_folder, "train", ["image", "label"])
    assert grey_values(train) == [0, 1, 2, 3, 4]
    assert isinstance(train.features["image"], Image)
    assert train.features["label"].names == ["a", "b"]
    assert grey_values(load_split(str(parquet_folder), "test")) == [9, 10, 11, 12]


def test_folder_one_level_down_as_in_a_hub_checkout(parquet_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(parquet_folder, tmp_path / "checkout" / "data")
    assert len(load_split(tmp_path / "checkout", "test")) == 4


@pytest.mark.parametrize("place", [".", "data"])
def test_a_folder_without_all_files_of_a_split_is_refused(parquet_folder: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(parquet_folder, tmp_path / "partial" / place)
    (tmp_path / "partial" / place / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(MisconfigurationException) as info:
        load_split(tmp_path / "partial", "train")
    assert "of 2 files 'train' it lacks 1, the first 'train-00001-of-00002.parquet'" in sentence(info)
    assert len(load_split(tmp_path / "partial", "test")) == 4
    with pytest.raises(MisconfigurationException, match="lacks 1"):  # beside a file, too
        load_split(tmp_path / "partial" / place / "test.parquet", "train")


def test_parquet_file_and_its_siblings(parquet_folder: Path) -> None:
    assert len(load_split(parquet_folder / "test.parquet", "test")) == 4
    assert len(load_split(parquet_folder / "test.parquet", "train")) == 5


def test_parquet_file_of_any_name_is_training_data_only(parquet_folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "digits.parquet"
    alone.parent.mkdir()
    shutil.copy(parquet_folder / "test.parquet", alone)
    assert len(load_split(alone, "train")) == 4
    with pytest.raises(MisconfigurationException) as info:
        load_split(alone, "test")
    assert "holds the split 'train' only" in sentence(info)


def test_save_to_disk_folders(tmp_path: Path) -> None:
    DatasetDict({"train": small_dataset(3), "test": small_dataset(2)}).save_to_disk(tmp_path / "both")
    small_dataset(3).save_to_disk(tmp_path / "one")
    assert len(load_split(tmp_path / "both", "train")) == 3
    assert len(load_split(tmp_path / "both", "test")) == 2
    assert len(load_split(tmp_path / "one", "train")) == 3
    for name, present in (("both", "'train', 'test'"), ("one", "'train'")):
        with pytest.raises(MisconfigurationException) as info:
            load_split(tmp_path / name, "validation")
        assert f"has the splits {present}, but 'validation' is needed" in sentence(info)


def test_reading_leaves_no_cache_behind(parquet_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    load_split(parquet_folder, "train")
    load_split("sample", "train")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("source", ["nowhere.parquet", "./no/where", "/no/where", "data/train.parquet", "mnist"])
def test_missing_path_is_said_so(source: str) -> None:
    with pytest.raises(MisconfigurationException) as info:
        load_split(source, "train")
    assert f"{source!r} does not exist" in sentence(info)


def test_wrong_split_names_the_files_found(parquet_folder: Path, empty_folder: Path) -> None:
    with pytest.raises(MisconfigurationException) as info:
        load_split(parquet_folder, "validation")
    assert "no split 'validation'" in sentence(info)
    assert "'test.parquet'" in sentence(info)
    with pytest.raises(MisconfigurationException) as info:
        load_split(empty_folder, "train")
    assert sentence(info).endswith("the parquet files found are none.")


def test_wrong_columns_name_what_is_there(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a"]}, features=Features({"text": Value("string")}))
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(MisconfigurationException) as info:
        load_split(tmp_path, "train", ["image"])
    assert "has the columns 'text'" in sentence(info)
    assert "'image' is needed" in sentence(info)


def test_broken_or_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(MisconfigurationException, match="cannot be read as parquet"):
        load_split(tmp_path, "train")
    with pytest.raises(MisconfigurationException, match="only parquet files are read"):
        load_split(tmp_path / "rows.csv", "train")
    with pytest.raises(MisconfigurationException):
        load_split(tmp_path / "saved", "train")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("ylecun/mnist", True), ("sample", False), ("a/b/c", False), ("../mnist", False), ("a/b.parquet", False)],
)
def test_what_counts_as_a_hub_id(source: str, expected: bool) -> None:
    assert is_hub_id(source) is expected


def test_existing_folder_wins_over_a_hub_id(empty_folder: Path, parquet_folder: Path) -> None:
    shutil.copytree(parquet_folder, empty_folder / HUB_ID)
    assert not is_hub_id(HUB_ID)
    assert len(load_split(HUB_ID, "train")) == 5


class Hub:
    """Stands in for the Hub: counts the questions, and answers as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.questions = 0
        self.answer: Exception | None = urllib.error.URLError("no network")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(sources.urllib.request, "urlopen", self.urlopen)

    def urlopen(self, request: Any, timeout: float) -> Any:
        self.questions += 1
        if self.answer is not None:
            raise self.answer
        raise AssertionError("unreachable in these tests")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return Hub(monkeypatch, tmp_path / "cache")


def test_unreachable_hub_is_asked_once_and_the_ways_out_are_named(hub: Hub) -> None:
    with pytest.raises(MisconfigurationException) as info:
        load_split(HUB_ID, "train")
    text = sentence(info)
    assert hub.questions == 1
    assert repr(HUB_ID) in text
    for way_out in ("give a folder or parquet file", "use 'sample'", "get online once to fill the cache"):
        assert way_out in text
    assert datasets.config.HF_HUB_OFFLINE is False


def test_offline_mode_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(MisconfigurationException, match="offline mode is on"):
        load_split(HUB_ID, "train")
    assert hub.questions == 0


def test_any_answer_of_the_hub_counts_as_reachable(hub: Hub) -> None:
    hub.answer = urllib.error.HTTPError("hub", 403, "forbidden", Message(), None)
    assert sources._hub_answers("http://hub.invalid")
    hub.answer = TimeoutError()
    assert not sources._hub_answers("http://hub.invalid")


def test_prepared_cache_is_used_without_asking(hub: Hub, tmp_path: Path) -> None:
    arrow = tmp_path / "cache" / "somebody___something" / "default" / "0.0.0" / "0123456789abcdef"
    builder_files = tmp_path / "rows.parquet"
    small_dataset(3).to_parquet(builder_files)
    prepared = tmp_path / "prepared"
    datasets.load_dataset("parquet", data_files={"train": str(builder_files)}, cache_dir=str(prepared))
    written = next(prepared.glob("parquet/*/*/*/dataset_info.json")).parent
    shutil.copytree(written, arrow)
    info = (arrow / "dataset_info.json").read_text().replace('"dataset_name": "parquet"', '"dataset_name": "something"')
    (arrow / "dataset_info.json").write_text(info)
    (arrow / "parquet-train.arrow").rename(arrow / "something-train.arrow")
    assert grey_values(load_split(HUB_ID, "train")) == [0, 1, 2]
    assert hub.questions == 0


def test_downloaded_files_are_used_without_asking(hub: Hub, tmp_path: Path, parquet_folder: Path) -> None:
    repository = tmp_path / "cache" / "hub" / "datasets--somebody--something"
    shutil.copytree(parquet_folder, repository / "snapshots" / "0123abcd" / "data")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert len(load_split(HUB_ID, "train")) == 5
    assert hub.questions == 0


def test_an_incomplete_download_does_not_count_as_cached(hub: Hub, tmp_path: Path, parquet_folder: Path) -> None:
    repository = tmp_path / "cache" / "hub" / "datasets--somebody--something"
    shutil.copytree(parquet_folder, repository / "snapshots" / "0123abcd" / "data")
    (repository / "snapshots" / "0123abcd" / "data" / "train-00000-of-00002.parquet").unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert len(load_split(HUB_ID, "test")) == 4
    with pytest.raises(MisconfigurationException, match="get online once to fill the cache"):
        load_split(HUB_ID, "train")
    assert hub.questions == 1


def test_missing_packages_are_named_by_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == "PIL" else name)
    with pytest.raises(MisconfigurationException) as info:
        load_split("sample", "train")
    assert "not installed (pillow): install the extra" in sentence(info)
