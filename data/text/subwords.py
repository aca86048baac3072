"""Subwords of sentences, and batches of sentence pairs."""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from data.text.lines import decode, lines_of

PAD, UNK, BOS, EOS = range(4)  # <pad>, <unk>, <s>, </s>
KINDS = ("bpe", "unigram")
VERSION = sentencepiece.__version__  # another version may learn other subwords
# sentencepiece writes this character for a space, so the character itself needs special treatment.
SPACE = "▁"

Numbers = Sequence[int] | np.ndarray


class Item:
    """A pair for evaluation: the number of its line, from 0, and its two texts."""

    def __init__(self, number: int, source: str, reference: str) -> None:
        self.number, self.source, self.reference = number, source, reference


class Batch(NamedTuple):
    """Sentences and their translations as subword numbers, int64, padded at the end with 0.

    source (S, B): subwords, </s>. target (T, B): <s>, subwords, </s>. An empty sentence consists of these marks.
    """

    source: Tensor
    target: Tensor
    items: list[Item]


class Subwords:
    """The joint subwords of two languages, to encode and decode sentences.

    model: from `learn`. source, target: the languages.

    Any text can be encoded, and decodes to the same text, including spaces. Characters outside the training text are
    encoded as bytes. A space is put before the first word, so that it has the same subwords as elsewhere.
    """

    def __init__(self, *, model: bytes, source: str, target: str) -> None:
        self.options: dict[str, Any] = {"model": model, "source": source, "target": target}
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.space = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def __len__(self) -> int:
        return len(self.processor)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The size, the numbers of <s> and </s>, and the function to decode."""
        return {"vocab_size": len(self), "bos": BOS, "eos": EOS, "decode": self.decode}

    def encode(self, text: str) -> list[int]:
        """The text's subwords, without <s> and </s>."""
        if not text:
            return []
        first, *rest = f" {text}".split(SPACE)
        numbers = self.processor.encode(first)
        for part in rest:
            numbers += self.space + self.processor.encode(part)
        return numbers

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of subwords; <pad>, <unk>, <s> and </s> are left out. Bytes that are not UTF-8 become U+FFFD."""
        return self.processor.decode([int(number) for number in numbers if number > EOS]).removeprefix(" ")

    def lines(self, content: bytes, name: str) -> list[str]:
        """The sentences of a file, read as in training."""
        return lines_of(decode(content, name))

    def batch(self, sentences: Sequence[str], max_length: int) -> tuple[Batch, list[int]]:
        """A batch to translate, with sentences above max_length subwords in parts; and the sentence of each part."""
        parts: list[tuple[Item, list[int], list[int]]] = []
        for i, sentence in enumerate(sentences):
            if re.search("[\ud800-\udfff]", sentence):
                raise ValueError(f"{sentence!r} contains an unpaired surrogate: type it in UTF-8")
            numbers = self.encode(sentence)
            for begin in range(0, max(1, len(numbers)), max_length):
                parts.append((Item(i, sentence, ""), numbers[begin : begin + max_length], []))
        return batch_of(parts), [item.number for item, _, _ in parts]


def batch_of(pairs: Sequence[tuple[Item, Numbers, Numbers]]) -> Batch:
    """A batch of (item, source subwords, target subwords), the subwords without marks."""
    source = np.full((1 + max(len(numbers) for _, numbers, _ in pairs), len(pairs)), PAD)
    target = np.full((2 + max(len(numbers) for _, _, numbers in pairs), len(pairs)), PAD)
    target[0] = BOS
    for column, (_, read, written) in enumerate(pairs):
        source[: len(read), column], source[len(read), column] = read, EOS
        target[1 : 1 + len(written), column], target[1 + len(written), column] = written, EOS
    return Batch(torch.from_numpy(source), torch.from_numpy(target), [item for item, _, _ in pairs])


def learn(texts: Iterable[str], kind: str, vocab_size: int, option: str = "data.subword") -> bytes:
    """A sentencepiece model of `vocab_size` subwords, including <pad>, <unk>, <s>, </s> and 256 bytes; deterministic.

    ValueError if the texts have fewer subwords or more characters than that.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f" {text}" for text in texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",  # other rules change the text: ½ to 1⁄2, or two spaces to one
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # `encode` adds the space
            character_coverage=1.0,
            byte_fallback=True,
            max_sentence_length=1 << 20,  # bytes; longer sentences are skipped without a warning
            num_threads=1,  # the rounding of sums depends on it
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error)
        if found := re.search(r"set it to a value <= (\d+)", reason):
            raise ValueError(
                f"data.vocab_size={vocab_size} is too large: with {option}={kind} the training text has {found[1]} "
                f"subwords; type data.vocab_size={found[1]} or less, or train on more text"
            ) from None
        if found := re.search(rf"{vocab_size} vs (\d+)", reason):
            raise ValueError(
                f"data.vocab_size={vocab_size} is too small: the characters of the training text, 256 bytes and 4 "
                f"marks are {found[1]} subwords; type data.vocab_size={found[1]} or more"
            ) from None
        raise ValueError(f"sentencepiece cannot learn subwords from the training text: {reason}") from None
    return model.getvalue()
