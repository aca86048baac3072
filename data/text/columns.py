"""Columns of prepared tables: numbers of texts, and rows of different lengths."""

from typing import Any

import numpy as np


class Numbering(dict[Any, int]):
    """Numbers texts in the order of their first look-up."""

    def __missing__(self, key: Any) -> int:
        self[key] = len(self)
        return self[key]


class Ragged:
    """Rows of different lengths, which are views of one array: the concatenated `values`, and the rows' `offsets`."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.offsets)
