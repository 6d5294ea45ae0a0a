"""Text, the recurrent network and the metrics."""

import math
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sfn.experiments.classified import ClassifiedImages, labelled_images
from lightning_sfn.experiments.metrics import BitsPerCharacter, SquaredError
from lightning_sfn.experiments.perceptron import Perceptron
from lightning_sfn.experiments.recurrent import CharacterRNN
from lightning_sfn.experiments.text import CharacterText, Vocabulary, Windows, read_text


def test_windows_cover_the_text_once() -> None:
    text = "to be or not to be"
    vocabulary = Vocabulary(text)
    windows = Windows(vocabulary.encode(text, "training"), 4)
    letters = ["".join(vocabulary.characters[i] for i in row) for row in windows.__getitems__(range(len(windows)))]
    assert letters == ["to be", "e or ", " not ", " to b"]


def test_the_embedded_text_has_65_characters_and_is_split() -> None:
    train, held_out = read_text("sample", "train"), read_text("sample", "validation")
    assert train.startswith("First Citizen:\n")
    assert len(train) == pytest.approx(9 * len(held_out), rel=1e-3)
    data = CharacterText(sequence_length=20, batch_size=7, limit=1000)
    data.setup("fit")
    assert data.vocabulary is not None
    assert len(data.vocabulary) == 65
    assert next(iter(data.train_dataloader())).shape == (7, 21)


def test_a_folder_of_split_files(tmp_path: Path) -> None:
    (tmp_path / "ptb.train.txt").write_text(" aer banknote \n <unk> \n")
    (tmp_path / "ptb.valid.txt").write_text("zzz\n")
    assert read_text(tmp_path, "train") == "aer banknote\n<unk>\n"
    with pytest.raises(MisconfigurationException, match="validation text has the character 'z'"):
        CharacterText(tmp_path, sequence_length=3).setup("fit")


@pytest.mark.parametrize("name", ["val.txt", "ptb.val.txt", "valid.txt", "validation.txt", "my_val.txt"])
def test_the_held_out_text_has_one_of_several_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.txt").write_text("abc\n")
    (tmp_path / "intervals.txt").write_text("no\n")
    with pytest.raises(MisconfigurationException, match=r"no split 'validation'.*'intervals.txt', 'train.txt'\.$"):
        read_text(tmp_path, "validation")
    (tmp_path / name).write_text("cab\n")
    assert read_text(tmp_path, "validation") == "cab\n"


@pytest.mark.parametrize(
    ("content", "said"), [("", "is empty"), (" \n\n", "is empty"), (b"\xff\xfe\x00", "cannot be read as UTF-8")]
)
def test_texts_that_will_not_do(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MisconfigurationException, match=said):
        read_text(path, "train")
    with pytest.raises(MisconfigurationException, match="does not exist"):
        read_text(tmp_path / "nothing.txt", "train")
    with pytest.raises(MisconfigurationException, match="two different ones"):
        Vocabulary("aaaa")
    with pytest.raises(MisconfigurationException, match="no window of 9"):
        Windows(torch.zeros(5, dtype=torch.uint8), 9)


def test_the_network_is_pytorchs_and_its_loss_is_fixed() -> None:
    model = CharacterRNN(5, 6).double()
    windows = torch.randint(5, (3, 8))
    twin = nn.RNN(6, 6, batch_first=True).double()
    with torch.no_grad():
        twin.weight_ih_l0.copy_(torch.eye(6))
        twin.weight_hh_l0.copy_(model.recurrent)
        twin.bias_ih_l0.copy_(model.bias)
        twin.bias_hh_l0.zero_()
    expected = model.output(twin(model.input(windows[:, :-1]))[0])
    torch.testing.assert_close(model(windows[:, :-1]), expected)
    torch.testing.assert_close(model.recurrent @ model.recurrent.T, torch.eye(6).double(), atol=1e-5, rtol=0)
    # Nothing is carried: the loss is the same bits again, also after other windows, and in another order.
    first = model.loss(windows)
    model.loss(torch.randint(5, (4, 8)))
    assert torch.equal(model.loss(windows), first)
    torch.testing.assert_close(model.loss(windows[[2, 0, 1]]), first)


def test_metrics_add_up_over_uneven_batches() -> None:
    bits, error = BitsPerCharacter(), SquaredError()
    bits.update(torch.tensor(3 * math.log(2)), 3)
    bits.update(torch.tensor(5 * math.log(4)), 5)
    assert float(bits.compute()) == pytest.approx((3 + 10) / 8)
    x, y = torch.rand(5, 4), torch.rand(5, 4)
    error.update(x[:2], y[:2])
    error.update(x[2:], y[2:])
    assert float(error.compute()) == pytest.approx(float((x - y).square().sum() / 5), rel=1e-6)


def test_labelled_images() -> None:
    pixels, labels = labelled_images("mnist", "sample", limit=20)
    assert pixels.shape == (20, 100)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    with pytest.raises(MisconfigurationException, match="no embedded sample of cifar10"):
        labelled_images("cifar10", "sample")
    with pytest.raises(MisconfigurationException, match="image_size=40"):
        ClassifiedImages(image_size=40)
    with pytest.raises(MisconfigurationException, match="3 pixels"):
        Perceptron((4, 3, 10)).loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


def test_a_text_with_more_characters_than_the_model_is_refused_before_the_first_batch() -> None:
    data = CharacterText(sequence_length=20, batch_size=7, limit=1000)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, fast_dev_run=True)
    with pytest.raises(MisconfigurationException, match=r"vocabulary_size=5, but the text has 65 different"):
        trainer.fit(CharacterRNN(5, 6), data)
    trainer.fit(CharacterRNN(65, 6), data)


def test_a_perceptron_is_tested_on_the_test_images() -> None:
    torch.manual_seed(0)
    model, data = Perceptron((25, 3, 10)), ClassifiedImages(image_size=5, batch_size=300)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (found,) = trainer.test(model, data, verbose=False)
    images, labels = labelled_images("mnist", "sample", "test", image_size=5)
    assert found["test_error"] == pytest.approx(model.error(images, labels), abs=1e-6)
    assert found["test_loss"] == pytest.approx(float(model.loss(images, labels).detach()), rel=1e-5)
