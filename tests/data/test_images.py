"""Images as sequences: the idx format, the order of pixels, the splits, and runs on them."""

import gzip
import json
import struct
from functools import partial

import numpy as np
import pytest
import torch
from conftest import real_data

import train
from data.images import ORDERS, Digits, ImageSequences, read_idx
from sru import LSTM
from tasks.classification import Classification

SMALL = ("task=image", "depth=1", "width=16", "epochs=2")
WHITE = 111  # the largest byte of the images below
URL = {"url": "https://localhost/nowhere/", "sha256_images": None, "sha256_labels": None}
FILES = {
    "train": {"images": "train-images", "labels": "train-labels"} | URL,
    "test": {"images": "test-images", "labels": "test-labels"} | URL,
}


def write_idx(path, array):
    array = np.asarray(array, np.uint8)
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.fixture
def corpus(tmp_path):
    """Twelve images of 2 x 3 pixels to train on, four of the test; image i begins with i."""
    folder = tmp_path / "root/small"
    folder.mkdir(parents=True)
    for split, count in (("train", 12), ("test", 4)):
        images = np.arange(count)[:, None, None] + 20 * np.arange(6).reshape(2, 3)
        write_idx(folder / f"{split}-images", images)
        write_idx(folder / f"{split}-labels", np.arange(count) % 3)
    return folder


def data(corpus, **options):
    options = {"num_val": 3, "batch_size": 4} | options
    return ImageSequences(root=str(corpus.parent), folder="small", files=FILES, **options)


def rows_of(batches):
    """{image: (sequence, label)} of all batches, in bytes."""
    return {
        int(x[:, b].min() * WHITE + 0.5) % 20: ((x[:, b] * WHITE).round().long().tolist(), int(labels[b]))
        for x, labels in batches
        for b in range(len(labels))
    }


def test_a_row_is_a_step(corpus):
    images = data(corpus)
    assert images.model_kwargs == {"input_size": 3, "num_classes": 3}
    found = rows_of(images.test_dataloader())
    assert sorted(found) == [0, 1, 2, 3]
    assert found[2] == ([[2, 22, 42], [62, 82, 102]], 2)
    x, labels = next(iter(images.train_dataloader()))
    assert x.shape == (2, 4, 3)
    assert x.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert 0 <= x.min() <= x.max() <= 1


def test_a_pixel_is_a_step(corpus):
    images = data(corpus, order="pixels")
    assert images.model_kwargs["input_size"] == 1
    assert rows_of(images.test_dataloader())[3] == ([[3], [23], [43], [63], [83], [103]], 0)


def test_pixels_are_permuted_as_in_every_run(corpus):
    one, other = (data(corpus, order="permuted", seed=seed) for seed in (1, 2))
    assert one.model_kwargs["input_size"] == 1
    found, same = rows_of(one.test_dataloader()), None
    other.setup()
    same = rows_of(other.test_dataloader())
    assert found == same
    order = [value[0] // 20 for value in found[0][0]]
    assert sorted(order) == list(range(6))
    assert order != list(range(6))
    assert [value[0] // 20 for value in found[3][0]] == order


def test_every_image_is_in_one_split_whatever_the_seed(corpus):
    splits = []
    for seed in (1, 2):
        images = data(corpus, seed=seed)
        images.setup()
        train, val = rows_of(images.train_dataloader()), rows_of(images.val_dataloader())
        assert sorted([*train, *val]) == list(range(12))
        assert len(val) == 3
        splits.append(sorted(val))
    assert splits[0] == splits[1]
    few = data(corpus, num_train=5)
    few.setup()
    assert len(rows_of(few.train_dataloader())) == 5


def test_packed_files_are_read(corpus):
    expected = rows_of_test(corpus)
    for path in corpus.iterdir():
        (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert rows_of_test(corpus) == expected


def rows_of_test(corpus):
    images = data(corpus)
    images.setup()
    return rows_of(images.test_dataloader())


def test_a_damaged_file_is_refused(corpus):
    path = corpus / "train-images"
    content = path.read_bytes()
    for damaged, message in (
        (content[:-1], "is damaged: 71 bytes instead of 12 x 2 x 3"),
        (content[:7], "is not an idx file of bytes in 3 dimensions"),
        (b"\0\0\x0d\x03" + content[4:], "is not an idx file of bytes in 3 dimensions: it begins with 00000d03"),
        (b"", "is not an idx file"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_idx(path, 3)
    path.write_bytes(content)
    for labels, message in (
        (np.full(12, 255), "no images with the test labels"),
        ([0, 1, 2, 4] * 3, "no training image has the label 3"),
    ):
        write_idx(corpus / "train-labels", labels)
        with pytest.raises(ValueError, match=message):
            data(corpus).setup()
    write_idx(corpus / "train-labels", np.arange(12) % 3)
    for images, message in (
        (np.zeros((12, 2, 3)), "some of each are needed, not all black"),
        (np.ones((12, 3, 2)), "different sizes, 3 x 2 and 2 x 3"),
    ):
        write_idx(path, images)
        with pytest.raises(ValueError, match=message):
            data(corpus).setup()
    path.write_bytes(content)
    write_idx(corpus / "train-labels", np.arange(11) % 3)
    with pytest.raises(ValueError, match="has 12 images in train-images and 11 labels in train-labels"):
        data(corpus).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "columns"}, r"data\.order=columns must be one of rows, pixels, permuted"),
        ({"num_val": 12}, r"data\.num_val=12 leaves none of 12 images to train on: type data\.num_val=11"),
        (
            {"num_train": 10},
            r"data\.num_train=10 is too large: there are 12 images, data\.num_val=3; type data\.num_train=9 or less",
        ),
        ({"num_train": 0}, r"data\.num_train=0 must be a whole number, 1 or more"),
        ({"num_val": "many"}, r"data\.num_val=many must"),
        ({"num_train": 1.5}, r"data\.num_train=1\.5 must"),
    ],
)
def test_a_wrong_option_is_refused(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        data(corpus, **options).setup()


def test_a_missing_corpus_says_what_to_do(tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot download https://localhost/nowhere/train-images\.gz"):
        ImageSequences(root=str(tmp_path), folder="small", files=FILES).prepare_data()


@pytest.mark.parametrize("order", ORDERS)
def test_the_digits_need_no_file(order):
    digits = Digits(order=order, num_val=200, batch_size=32)
    assert digits.model_kwargs == {"input_size": 8 if order == "rows" else 1, "num_classes": 10}
    sizes = {split: len(labels) for split, (_, labels) in digits.splits.items()}
    assert sizes == {"train": 1237, "val": 200, "test": 360}
    x, _ = next(iter(digits.test_dataloader()))
    assert x.shape == ((8, 32, 8) if order == "rows" else (64, 32, 1))
    assert x.max() == 1


@pytest.mark.parametrize("model", ["sru", "lstm", "transformer"])
def test_a_run_learns_the_digits(configure, tmp_path, model):
    train.run(configure(*SMALL, f"model={model}", "epochs=5", "width=32", "task.optimizer.lr=1e-2"))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert metrics["test/accuracy"] > 60


def test_resumed_equals_uninterrupted(configure, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = (*SMALL, "data.num_train=200", "trainer.val_check_interval=3")
    train.run(configure(*often, f"run_dir={whole}"))
    train.run(configure(*often, f"run_dir={parts}", "trainer.max_steps=5"))
    train.run(configure(*often, f"run_dir={parts}", f"resume={parts}", "trainer.max_steps=-1"))
    one, two = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (whole, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_resume_on_other_images_is_refused(configure, tmp_path):
    train.run(configure(*SMALL, "epochs=1", "data.num_train=64"))
    with pytest.raises(ValueError, match=r"data\.order was rows and is pixels"):
        train.run(configure(*SMALL, "epochs=2", "data.num_train=64", "data.order=pixels", f"resume={tmp_path / 'run'}"))


def test_features_are_classified_by_their_last_step():
    options = {"num_classes": 3, "input_size": 4, "dropout": 0.0}
    task = Classification(encoder=partial(LSTM, hidden_size=6), optimizer=torch.optim.Adam, **options).eval()
    x, pad = torch.randn(5, 3, 4), torch.arange(5)[:, None] >= torch.tensor([5, 2, 1])
    together = task(x, pad)
    for b, length in enumerate((5, 2, 1)):
        torch.testing.assert_close(task(x[:length, b, None])[0], together[b])
    loss, metrics, size = task.loss((x, torch.tensor([0, 1, 2]), pad))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(together, torch.tensor([0, 1, 2])))
    assert size == 3
    assert float(metrics["accuracy"]) in (0, pytest.approx(100 / 3), pytest.approx(200 / 3), 100)


@pytest.mark.parametrize("order", ORDERS)
def test_real_mnist(configure, order):
    from hydra.utils import instantiate

    images = instantiate(configure("task=image", f"data=mnist_{order}", f"data.root={real_data('mnist')}").data)
    assert images.model_kwargs == {"input_size": 28 if order == "rows" else 1, "num_classes": 10}
    assert {split: len(labels) for split, (_, labels) in images.splits.items()} == {
        "train": 55000,
        "val": 5000,
        "test": 10000,
    }
    assert images.splits["test"][1][:5].tolist() == [7, 2, 1, 0, 4]
