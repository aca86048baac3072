"""Images as sequences: MNIST by rows, by pixels, and by pixels in a fixed random order (Le et al., 2015)."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.base import DataModule, require_whole
from data.batching import Batches
from data.download import fetch, read_bytes

ORDERS = ("rows", "pixels", "permuted")
PERMUTATION_SEED = 1234  # the seed of a run changes neither the order of the pixels nor the splits


class Form(NamedTuple):
    """The format of the sequences.

    shape (T, n): of each sequence. white: the byte value of white; None in older checkpoints, which lack it.
    """

    order: str
    shape: tuple[int, int]
    num_classes: int
    white: int | None

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {"input_size": self.shape[1], "num_classes": self.num_classes}


class ImageSequences(DataModule[Batches]):
    """Grey images of one size, each a sequence; a batch is (x (T, B, n) float32 in 0 to 1, labels (B,) int64).

    root: folder of the corpora, may be read-only; files lie in root/folder and are downloaded if absent.
    folder: the corpus's folder.
    files: {images, labels, url, sha256 of both} for `train` and `test`, in the idx format of MNIST.
    order: rows: a step is a row; pixels: a pixel, row by row; permuted: pixels in one random order for all images.
    num_val: size of the validation set, the end of the shuffled training set.
    num_train: number of the remaining images to train on; None for all.
    """

    MODEL_KWARGS = ("input_size", "num_classes")
    SPLIT_OPTIONS = ("order", "num_train", "num_val")
    ADDED_STATE = ("white",)

    def __init__(
        self,
        *,
        root: str,
        folder: str,
        files: Mapping[str, Mapping[str, Any]],
        order: str = "rows",
        num_val: int = 5000,
        num_train: int | None = None,
        batch_size: int = 100,
        seed: int = PERMUTATION_SEED,
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"data.order={order} must be one of {', '.join(ORDERS)}")
        require_whole(num_val=num_val)
        if num_train is not None:
            require_whole(num_train=num_train)
        self.folder = Path(root).expanduser() / folder
        self.files = files
        self.order = order
        self.num_val, self.num_train = num_val, num_train
        self.batch_size = batch_size
        self.seed = seed

    def load(self) -> None:
        """Reads the images; `splits` are arrays of sequences (N, T, n) in bytes, and labels."""
        images = self.read()
        splits = {
            split: (self.sequences(pixels), torch.from_numpy(labels.astype(np.int64)))
            for split, (pixels, labels) in (self.split(*images["train"]) | {"test": images["test"]}).items()
        }
        shape = splits["test"][0].shape[1:]
        form = Form(self.order, shape, int(images["train"][1].max()) + 1, int(images["train"][0].max()))
        if (known := self.checkpoint_vocabulary) is not None:
            if form[:3] != known[:3]:
                raise ValueError(
                    "order, (steps, features per step) and number of classes of the data are {}, {}, {}, those of the "
                    "checkpoint {}, {}, {}: name data with the same".format(*form[:3], *known[:3])
                )
            form = form._replace(white=known.white or form.white)
        self.vocabulary, self.splits = form, splits

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Images (N, height, width) and labels (N,) of `train` and `test` in bytes; downloads absent files."""
        images = {}
        for split, file in self.files.items():
            pixels, labels = (
                read_idx(fetch(self.folder / file[kind], f"{file['url']}{file[kind]}.gz", file[f"sha256_{kind}"]), dims)
                for kind, dims in (("images", 3), ("labels", 1))
            )
            if len(pixels) != len(labels):
                raise ValueError(
                    f"{self.folder} has {len(pixels)} images in {file['images']} and {len(labels)} labels in "
                    f"{file['labels']}: these files do not belong together"
                )
            images[split] = pixels, labels
        check(images, self.folder)
        return images

    def split(self, images: np.ndarray, labels: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Divides the training images into training and validation."""
        count = len(images)
        if self.num_val >= count:
            raise ValueError(
                f"data.num_val={self.num_val} leaves none of {count} images to train on: "
                + (f"type data.num_val={count - 1} or less" if count > 1 else "at least 2 images are needed")
            )
        if self.num_train is not None and self.num_train > count - self.num_val:
            raise ValueError(
                f"data.num_train={self.num_train} is too large: there are {count} images, data.num_val={self.num_val}; "
                f"type data.num_train={count - self.num_val} or less"
            )
        shuffled = np.random.default_rng(PERMUTATION_SEED).permutation(count)
        rows = {"train": shuffled[: count - self.num_val][: self.num_train], "val": shuffled[count - self.num_val :]}
        return {split: (images[chosen], labels[chosen]) for split, chosen in rows.items()}

    def sequences(self, images: np.ndarray) -> np.ndarray:
        """Images (N, height, width) as sequences (N, T, n)."""
        if self.order == "rows":
            return images
        pixels = images.reshape(len(images), -1, 1)
        if self.order == "pixels":
            return pixels
        return pixels[:, np.random.default_rng(PERMUTATION_SEED).permutation(pixels.shape[1])]

    def batches(self, split: str, seed: int | None = None) -> Batches[tuple[Tensor, Tensor]]:
        images, labels = self.splits[split]

        def make(rows: list[int]) -> tuple[Tensor, Tensor]:
            x = torch.from_numpy(images[rows]).float() / self.vocabulary.white
            return x.transpose(0, 1).contiguous(), labels[rows]

        return Batches(make, range(len(labels)), np.ones(len(labels)), batch_size=self.batch_size, seed=seed)

    def train_loader(self) -> Batches[tuple[Tensor, Tensor]]:
        return self.batches("train", self.seed)

    def evaluation(self, split: str) -> Batches[tuple[Tensor, Tensor]]:
        return self.batches(split)

    def state_dict(self) -> dict[str, Any]:
        self.setup()
        order, _, num_classes, white = self.vocabulary
        sizes = {split: list(images.shape) for split, (images, _) in self.splits.items()}
        return {"order": order, "num_classes": num_classes, "sizes": sizes, "white": white}

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Form:
        steps, size = state_dict["sizes"]["test"][1:]
        return Form(state_dict["order"], (steps, size), state_dict["num_classes"], state_dict.get("white"))


def check(images: Mapping[str, tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    """ValueError unless images exist, are not all black, and have the same size and classes in `train` and `test`."""
    (train, labels), (test, test_labels) = images["train"], images["test"]
    if not train.size or not test.size or not train.any():
        raise ValueError(
            f"{folder} has {len(train)} training and {len(test)} test images: some of each are needed, not all black"
        )
    if train.shape[1:] != test.shape[1:]:
        sizes = " and ".join(" x ".join(map(str, a.shape[1:])) for a in (train, test))
        raise ValueError(f"{folder}: training and test images have different sizes, {sizes}")
    if unknown := sorted({*test_labels.tolist()} - {*labels.tolist()}):
        raise ValueError(f"{folder}: the training set has no images with the test labels {unknown[:5]}")
    if missing := sorted({*range(int(labels.max()))} - {*labels.tolist()}):
        raise ValueError(f"{folder}: labels must be 0, 1, 2, ..., but no training image has the label {missing[0]}")


class Digits(ImageSequences):
    """The 1,797 digits of 8 x 8 pixels bundled with scikit-learn; no file, no download. Every fifth is a test image."""

    def __init__(self, *, root: str = "", **options: Any) -> None:
        super().__init__(root=root, folder="", files={}, **options)

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
        is_test = np.arange(len(labels)) % 5 == 0
        return {"train": (images[~is_test], labels[~is_test]), "test": (images[is_test], labels[is_test])}


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The bytes of an idx file, plain or packed, with `dims` dimensions."""
    content = read_bytes(path)
    head = 4 + 4 * dims
    if len(content) < head or content[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path} is not an idx file of bytes in {dims} dimensions: it begins with {content[:4].hex()}")
    shape = struct.unpack(f">{dims}I", content[4:head])
    if len(content) - head != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} is damaged: {len(content) - head} bytes instead of {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
