"""Pixels against Pillow and against averages worked out by hand; loaders against the tensor they serve."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lightning_sfn.experiments.mnist import ImageRows, MNISTDataModule, decode_images
from lightning_sfn.experiments.sources import load_split


def image_rows(pixels: np.ndarray) -> Dataset:
    images = [PillowImage.fromarray(image) for image in pixels]
    return Dataset.from_dict({"image": images}, features=Features({"image": Image()}))


def prepared(**arguments: int) -> MNISTDataModule:
    module = MNISTDataModule(**arguments)
    module.setup("fit")
    return module


def random_pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def test_shrinks_exactly_as_pillows_box_filter() -> None:
    first = load_split("sample", "test").select(range(20))
    expected = [np.asarray(image.resize((10, 10), PillowImage.Resampling.BOX)) for image in first[:]["image"]]
    result = decode_images(first, 10, "sample")
    assert result.dtype == torch.float32
    np.testing.assert_array_equal(result.numpy() * 255, np.stack(expected).reshape(20, 100).astype(np.float32))


@pytest.mark.parametrize("size", [14, 7, 4])
def test_is_the_mean_of_equal_blocks_where_the_size_divides(size: int) -> None:
    pixels = random_pixels(3)
    blocks = pixels.reshape(3, size, 28 // size, size, 28 // size).mean(axis=(2, 4)).reshape(3, -1)
    result = decode_images(image_rows(pixels), size, "test") * 255
    assert np.abs(result.numpy() - blocks).max() <= 1.0  # two passes, each rounded to an integer
    pooled = F.adaptive_avg_pool2d(torch.from_numpy(pixels).float()[:, None], size).reshape(3, -1)
    assert (result - pooled).abs().max() <= 1.0


def test_constant_image_stays_constant() -> None:
    result = decode_images(image_rows(np.full((1, 28, 28), 255, dtype=np.uint8)), 10, "test")
    assert torch.equal(result, torch.ones(1, 100))


def test_rows_run_left_to_right_then_down() -> None:
    pixels = np.zeros((1, 28, 28), dtype=np.uint8)
    pixels[0, 0, -1] = 255  # top right
    assert decode_images(image_rows(pixels), 28, "test")[0].nonzero().item() == 27


def test_full_size_is_kept_as_bytes_and_served_as_floats() -> None:
    pixels = random_pixels(4)
    stored = decode_images(image_rows(pixels), 28, "test")
    assert stored.dtype == torch.uint8
    batch = ImageRows(stored).__getitems__([2, 0])
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), pixels[[2, 0]].reshape(2, -1).astype(np.float32) / np.float32(255))
    assert torch.equal(ImageRows(stored)[2], batch[0])


def test_training_loader_serves_every_image_once_in_a_new_order_each_epoch() -> None:
    loader = prepared(batch_size=300).train_dataloader()
    first, second = torch.cat(list(loader)), torch.cat(list(loader))
    assert first.shape == (5000, 100)
    assert not torch.equal(first, second)
    everything = loader.dataset.pixels  # type: ignore[attr-defined]
    for epoch in (first, second):
        assert torch.equal(as_sorted(epoch), as_sorted(everything))


def as_sorted(rows: Tensor) -> Tensor:
    return torch.from_numpy(rows.numpy()[np.lexsort(rows.numpy().T)])


def test_batches_do_not_share_memory_with_the_stored_tensor() -> None:
    loader = prepared().train_dataloader()
    before = loader.dataset.pixels.clone()  # type: ignore[attr-defined]
    next(iter(loader)).zero_()
    assert torch.equal(loader.dataset.pixels, before)  # type: ignore[attr-defined]


def test_validation_loader_serves_the_test_split_in_order() -> None:
    loader = prepared(batch_size=400, image_size=14).val_dataloader()
    assert [tuple(batch.shape) for batch in loader] == [(400, 196), (400, 196), (200, 196)]
    expected = decode_images(load_split("sample", "test"), 14, "sample")
    assert torch.equal(torch.cat(list(loader)), expected)


def test_worker_processes_serve_the_same_rows() -> None:
    alone, helped = prepared(batch_size=500), prepared(batch_size=500, num_workers=1)
    assert torch.equal(torch.cat(list(alone.val_dataloader())), torch.cat(list(helped.val_dataloader())))


def test_setup_decodes_once() -> None:
    module = prepared()
    rows = module.train_dataloader().dataset
    module.setup("fit")
    module.setup("validate")
    assert module.train_dataloader().dataset is rows


def test_trains_in_a_trainer_with_known_batch_sizes() -> None:
    seen: list[int] = []

    class Counting(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(100))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            seen.append(len(batch))
            self.log("loss", batch.mean(), on_step=False, on_epoch=True)
            return (batch - self.bias).square().mean()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = MNISTDataModule(batch_size=1500)
    trainer = pl.Trainer(
        max_epochs=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Counting(), datamodule=module)
    assert seen == [1500, 1500, 1500, 500]
    mean = module.train_dataloader().dataset.pixels.mean()  # type: ignore[attr-defined]
    torch.testing.assert_close(trainer.callback_metrics["loss"], mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [{"image_size": 0}, {"image_size": 29}, {"image_size": 10.0}, {"batch_size": 0}, {"num_workers": -1}],
)
def test_refuses_arguments_out_of_range(arguments: dict[str, int]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(MisconfigurationException, match=rf"got {name}={value}, but {name} must be an integer"):
        MNISTDataModule(**arguments)


def test_refuses_other_images(tmp_path: Path) -> None:
    small = image_rows(np.zeros((2, 8, 8), dtype=np.uint8))
    with pytest.raises(MisconfigurationException, match=r"row 0 of 'here' is \(8, 8\) in mode 'L'"):
        decode_images(small, 10, "here")
    text = Dataset.from_dict({"image": [1]}, features=Features({"image": Value("int64")}))
    with pytest.raises(MisconfigurationException, match="images are needed"):
        decode_images(text, 10, "here")


def test_reads_images_stored_without_feature_metadata() -> None:
    typed = image_rows(random_pixels(2))
    plain = Dataset.from_list(typed.cast_column("image", Image(decode=False)).to_list())
    assert not isinstance(plain.features["image"], Image)
    assert torch.equal(decode_images(plain, 10, "plain"), decode_images(typed, 10, "typed"))
