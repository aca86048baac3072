"""Sentences of a person's own for classification: lines of `label text`, in one file or in one for each split."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.classification import Example, SentenceClassification
from data.download import own_file
from data.text import lines

MANY = 20  # labels; more of them, in every second line, are no labels
DOS_END = "\x1a"  # Ctrl-Z, which some programs of Windows write at the end of a text


class OwnSentences(SentenceClassification):
    """Files of `label text` lines in UTF-8; a label is any word. Blank lines are passed over. Nothing is downloaded.

    path: one file, of which `fold` chooses the tenth that tests, and a tenth of the rest validates.
    train, val, test: instead, a file each; without val, `fold` chooses the tenth of train that validates.
    labels: in the order of their numbers; None for all of the training file, sorted.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        labels: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        given = {name: file for name, file in (("path", path), ("train", train), ("val", val), ("test", test)) if file}
        if {*given} not in ({"path"}, {"train", "test"}, {"train", "val", "test"}):
            raise ValueError(
                f"the sentences are files of yours, lines of `label text`, and {' and '.join(given) or 'none'} of them "
                "is given: type data.path=FILE, or data.train=FILE data.test=FILE, and data.val=FILE where there is one"
            )
        if labels is not None and (isinstance(labels, str) or len(labels) != len({*map(str, labels)}) or not labels):
            raise ValueError(f"data.labels={labels} must be different words: type 'data.labels=[no,yes]', or null")
        files = {
            name.replace("path", "all"): {
                "name": str(own_file(name, file)),
                "url": None,
                "sha256": None,
                "examples": None,
            }
            for name, file in given.items()
        }
        super().__init__(labels=[str(label) for label in labels or ()], files=files, **options)

    def read(self) -> dict[str, list[Example]]:
        if not self.labels and self.checkpoint_vocabulary is not None:
            self.labels = list(self.checkpoint_vocabulary.labels)
        if not self.labels:
            key = "all" if "all" in self.files else "train"
            found = [label for _, label, _ in self.lines_of(self.folder / self.files[key]["name"])]
            self.labels = sorted({*found})
            if len(self.labels) > MANY and 2 * len(self.labels) > len(found):
                raise ValueError(
                    f"{self.files[key]['name']} has {len(self.labels)} different labels in {len(found)} lines, such as "
                    f"{', '.join(self.labels[:3])}: a line is `label text`, with a space or a tab between"
                )
        return super().read()

    def lines_of(self, path: Path) -> Iterator[tuple[str, str, str]]:
        return (found for found in super().lines_of(path) if found[1])

    def decode(self, content: bytes, name: Path) -> str:
        return lines.decode(content, name).replace(DOS_END, "")

    def number_of(self, label: str) -> int | None:
        return self.labels.index(label) if label in self.labels else None

    @property
    def known_labels(self) -> str:
        return f"of {', '.join(self.labels[:10])}"
