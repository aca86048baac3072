"""Images as sequences: MNIST by rows, by pixels, and by pixels in a fixed random order (Le et al., 2015)."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from data.batching import Batches
from data.download import fetch, read_bytes

ORDERS = ("rows", "pixels", "permuted")
PERMUTATION_SEED = 1234  # a run's own seed never moves a pixel, or an image to another split


class Form(NamedTuple):
    """What the sequences are that a network knows; needs no corpus.

    shape (T, n): of each. white: the number of what is white; None in older checkpoints, which do not tell.
    """

    order: str
    shape: tuple[int, int]
    num_classes: int
    white: int | None

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know."""
        return {"input_size": self.shape[1], "num_classes": self.num_classes}


class ImageSequences(pl.LightningDataModule):
    """Grey images of one size, each read as a sequence; a batch is (x (T, B, n) float32 in 0 to 1, labels (B,) int64).

    root: folder of the corpora, which may be read-only; files lie in root/folder and are downloaded when absent.
    folder: the corpus's folder.
    files: {images, labels, url, sha256 of both} for `train` and `test`, in the idx format of MNIST.
    order: rows: a step is a row; pixels: a pixel, row by row; permuted: the same in one random order for all images.
    num_val: images at the end of the shuffled training set that are validation.
    num_train: of the others, so many are trained on; None for all.
    """

    MODEL_KWARGS = ("input_size", "num_classes")  # the names in `model_kwargs`
    FIXED_BY_CHECKPOINT = ()  # by a checkpoint

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
        sizes = [num_val, batch_size] if num_train is None else [num_val, batch_size, num_train]
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(
                f"data.num_val={num_val}, data.num_train={num_train} and data.batch_size={batch_size} must be whole "
                "numbers, 1 or more; data.num_train=null is all"
            )
        self.folder = Path(root).expanduser() / folder
        self.files = files
        self.order = order
        self.num_val, self.num_train = num_val, num_train
        self.batch_size = batch_size
        self.seed = seed
        self.checkpoint_vocabulary: Form | None = None  # a checkpoint's, to read with; none is made of the corpus then
        self.splits: dict[str, tuple[np.ndarray, Tensor]] = {}  # sequences (N, T, n) of bytes, and labels

    def prepare_data(self) -> None:
        for file in self.files.values():
            for kind in ("images", "labels"):
                fetch(self.folder / file[kind], f"{file['url']}{file[kind]}.gz", file[f"sha256_{kind}"])

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Images (N, height, width) and labels (N,) of `train` and `test`, bytes; the largest byte is white."""
        found = {}
        for split, file in self.files.items():
            images, labels = (
                read_idx(fetch(self.folder / file[kind], None, file[f"sha256_{kind}"]), dims)
                for kind, dims in (("images", 3), ("labels", 1))
            )
            if len(images) != len(labels):
                raise ValueError(
                    f"{self.folder} has {len(images)} images in {file['images']} and {len(labels)} labels in "
                    f"{file['labels']}: these files do not belong together"
                )
            found[split] = images, labels
        check(found, self.folder)
        return found

    def setup(self, stage: str | None = None) -> None:
        """Reads the images and parts them; a second call does nothing."""
        if self.splits:
            return
        read = self.read()
        count = len(read["train"][0])
        if self.num_val >= count:
            raise ValueError(
                f"data.num_val={self.num_val} leaves none of {count} images to train on: "
                + (f"type data.num_val={count - 1} or less" if count > 1 else "2 or more are needed")
            )
        if self.num_train is not None and self.num_train > count - self.num_val:
            raise ValueError(
                f"data.num_train={self.num_train} is more than there are: {count} images, data.num_val={self.num_val}; "
                f"type data.num_train={count - self.num_val} or less"
            )
        shuffled = np.random.default_rng(PERMUTATION_SEED).permutation(count)
        rows = {"train": shuffled[: count - self.num_val][: self.num_train], "val": shuffled[count - self.num_val :]}
        parts = {split: tuple(a[chosen] for a in read["train"]) for split, chosen in rows.items()}
        self.num_classes = int(read["train"][1].max()) + 1
        self.white = int(read["train"][0].max())
        splits = {
            split: (self.sequences(images), torch.from_numpy(labels.astype(np.int64)))
            for split, (images, labels) in (parts | {"test": read["test"]}).items()
        }
        if self.checkpoint_vocabulary is not None:
            now = self.order, tuple(splits["test"][0].shape[1:]), self.num_classes
            if now != self.checkpoint_vocabulary[:3]:
                raise ValueError(
                    "order, steps and features of a step, and classes of the data are {}, {}, {}, those of the "
                    "checkpoint {}, {}, {}: name data with the same".format(*now, *self.checkpoint_vocabulary)
                )
            self.white = self.checkpoint_vocabulary.white or self.white
        self.splits = splits

    def sequences(self, images: np.ndarray) -> np.ndarray:
        """(N, T, n) of images (N, height, width)."""
        if self.order == "rows":
            return images
        pixels = images.reshape(len(images), -1, 1)
        if self.order == "pixels":
            return pixels
        return pixels[:, np.random.default_rng(PERMUTATION_SEED).permutation(pixels.shape[1])]

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know: input_size and num_classes. Prepares the data first."""
        if not self.splits:
            self.prepare_data()
            self.setup()
        return {"input_size": self.splits["train"][0].shape[2], "num_classes": self.num_classes}

    def loader(self, split: str, seed: int | None = None) -> Batches[tuple[Tensor, Tensor]]:
        images, labels = self.splits[split]

        def make(chosen: list[int]) -> tuple[Tensor, Tensor]:
            x = torch.from_numpy(images[chosen]).float() / self.white
            return x.transpose(0, 1).contiguous(), labels[chosen]

        every = range(len(labels))
        batches = Batches(make, every, np.ones(len(labels)), batch_size=self.batch_size, seed=seed)
        if seed is not None and self.trainer is not None:
            batches.limit(self.trainer.limit_train_batches)
        return batches

    def train_dataloader(self) -> Batches[tuple[Tensor, Tensor]]:
        return self.loader("train", self.seed)

    def val_dataloader(self) -> Batches[tuple[Tensor, Tensor]]:
        return self.evaluation("val")

    def test_dataloader(self) -> Batches[tuple[Tensor, Tensor]]:
        return self.evaluation("test")

    def evaluation(self, split: str) -> Batches[tuple[Tensor, Tensor]]:
        return self.loader(split)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint was trained on."""
        self.model_kwargs  # noqa: B018  prepares
        sizes = {split: list(images.shape) for split, (images, _) in self.splits.items()}
        return {"order": self.order, "num_classes": self.num_classes, "sizes": sizes, "white": self.white}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the checkpoint was trained on other images, or in another order."""
        for name, now in self.state_dict().items():
            if now != state_dict.get(name, now if name == "white" else None):
                raise ValueError(
                    f"the checkpoint was trained with {name} {state_dict[name]}, the data has {now}. Use the options "
                    "of the checkpoint's run (data=, data.order, data.num_train, data.num_val), or train again."
                )

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Form:
        """What a network knows, of a `state_dict`."""
        steps, size = state_dict["sizes"]["test"][1:]
        return Form(state_dict["order"], (steps, size), state_dict["num_classes"], state_dict.get("white"))


def check(found: Mapping[str, tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    """Refuse images that are none, black, or of another size or class in the test than in training."""
    (images, labels), (tested, answers) = found["train"], found["test"]
    if not images.size or not tested.size or not images.any():
        raise ValueError(
            f"{folder} has {len(images)} images to train on and {len(tested)} of the test: it needs some, not all black"
        )
    if images.shape[1:] != tested.shape[1:]:
        sizes = " and ".join(" x ".join(map(str, a.shape[1:])) for a in (images, tested))
        raise ValueError(f"{folder}: images to train on and of the test have other sizes, {sizes}")
    if unknown := sorted({*answers.tolist()} - {*labels.tolist()}):
        raise ValueError(f"{folder}: labels {unknown[:5]} of the test are none of those to train on")
    if missing := sorted({*range(int(labels.max()))} - {*labels.tolist()}):
        raise ValueError(f"{folder}: labels count the classes from 0 on, but none to train on is {missing[0]}")


class Digits(ImageSequences):
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries: no file, no download. Every fifth is a test's."""

    def __init__(self, *, root: str = "", **options: Any) -> None:
        super().__init__(root=root, folder="", files={}, **options)

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
        is_test = np.arange(len(labels)) % 5 == 0
        return {"train": (images[~is_test], labels[~is_test]), "test": (images[is_test], labels[is_test])}


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The bytes of an idx file, plain or packed, of so many dimensions."""
    content = read_bytes(path)
    head = 4 + 4 * dims
    if len(content) < head or content[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path} is no idx file of bytes in {dims} dimensions: it begins with {content[:4].hex()}")
    shape = struct.unpack(f">{dims}I", content[4:head])
    if len(content) - head != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} holds {len(content) - head} bytes, and says {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
