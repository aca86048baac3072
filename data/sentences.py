"""The user's own sentences for classification: lines of `label text`, in one file or in one for each split."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.classification import Example, SentenceClassification
from data.download import own_file
from data.text import lines

MAX_LABELS = 20  # with more labels, each on fewer than two lines on average, the first words are not labels
DOS_END = "\x1a"  # Ctrl-Z, which some Windows programs write at the end of a text


class OwnSentences(SentenceClassification):
    """Files of `label text` lines in UTF-8; a label is any word. Blank lines are skipped. Nothing is downloaded.

    path: one file; `fold` selects a tenth for the test, and a tenth of the rest is validation.
    train, val, test: instead, a file each; without val, `fold` selects a tenth of train for validation.
    labels: in the order of their indices; None for all in the training file, sorted.
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
        named = {key: name for key, name in {"path": path, "train": train, "val": val, "test": test}.items() if name}
        if {*named} not in ({"path"}, {"train", "test"}, {"train", "val", "test"}):
            raise ValueError(
                f"your sentences are lines of `label text` in files; given: {' and '.join(named) or 'none'}. Type "
                "data.path=FILE, or data.train=FILE data.test=FILE, and data.val=FILE if there is one"
            )
        if labels is not None and (isinstance(labels, str) or len(labels) != len({*map(str, labels)}) or not labels):
            raise ValueError(f"data.labels={labels} must be different words: type 'data.labels=[no,yes]', or null")
        unchecked = {"url": None, "sha256": None, "examples": None}
        files = {
            key.replace("path", "all"): {"name": str(own_file(key, name)), **unchecked} for key, name in named.items()
        }
        super().__init__(labels=[str(label) for label in labels or ()], files=files, **options)

    def read(self) -> dict[str, list[Example]]:
        if not self.labels and self.checkpoint_vocabulary is not None:
            self.labels = list(self.checkpoint_vocabulary.labels)
        if not self.labels:
            path = self.locate("all" if "all" in self.files else "train")
            labels = [label for _, label, _ in self.lines_of(path)]
            self.labels = sorted({*labels})
            if len(self.labels) > MAX_LABELS and 2 * len(self.labels) > len(labels):
                raise ValueError(
                    f"{path} has {len(self.labels)} different labels in {len(labels)} lines, such as "
                    f"{', '.join(self.labels[:3])}: a line is `label text`, with a space or a tab between"
                )
        return super().read()

    def lines_of(self, path: Path) -> Iterator[tuple[str, str, str]]:
        return (line for line in super().lines_of(path) if line[1])

    def decode(self, content: bytes, name: Path) -> str:
        return lines.decode(content, name).replace(DOS_END, "")

    def number_of(self, label: str) -> int | None:
        return self.labels.index(label) if label in self.labels else None

    @property
    def known_labels(self) -> str:
        return f"of {', '.join(self.labels[:10])}"
