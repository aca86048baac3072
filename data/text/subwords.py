"""How sentences become subwords, and pairs of sentences batches of them."""

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
VERSION = sentencepiece.__version__  # another may learn other subwords
# sentencepiece writes a space as this sign, and so cannot tell the sign in a text from a space.
SPACE = "▁"

Numbers = Sequence[int] | np.ndarray


class Item:
    """What evaluation needs to know of a pair: its line's number, from 0, and its two texts as they are written."""

    def __init__(self, number: int, source: str, reference: str) -> None:
        self.number, self.source, self.reference = number, source, reference


class Batch(NamedTuple):
    """Sentences and their translations in numbers of subwords, int64, padded at the end with 0.

    source (S, B): subwords, </s>. target (T, B): <s>, subwords, </s>. An empty sentence has these marks alone.
    """

    source: Tensor
    target: Tensor
    items: list[Item]


class Subwords:
    """The subwords of two languages, to read and write sentences with; needs no corpus.

    model: what `learn` gives. source, target: the languages.

    Every text can be written, characters that no training text has by their bytes, and reads back as it was, spaces
    and all. The first word of a text is written as if a space stood before it, so that it is the same word elsewhere.
    """

    def __init__(self, *, model: bytes, source: str, target: str) -> None:
        self.options: dict[str, Any] = {"model": model, "source": source, "target": target}
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.space = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def __len__(self) -> int:
        return len(self.processor)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know: vocab_size, the numbers bos of <s> and eos of </s>, and how to `decode`."""
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
        """The text of subwords; <pad>, <unk>, <s> and </s> are left out. Bytes that are no UTF-8 become U+FFFD."""
        return self.processor.decode([int(number) for number in numbers if number > EOS]).removeprefix(" ")

    def lines(self, content: bytes, name: str) -> list[str]:
        """The sentences of a file, as a text that is trained on is read."""
        return lines_of(decode(content, name))

    def batch(self, sentences: Sequence[str], max_length: int) -> tuple[Batch, list[int]]:
        """Sentences to translate, those of more than max_length subwords in parts; and whose part each is."""
        parts: list[tuple[Item, list[int], list[int]]] = []
        for i, sentence in enumerate(sentences):
            if re.search("[\ud800-\udfff]", sentence):
                raise ValueError(f"{sentence!r} has half a character: type it in UTF-8")
            numbers = self.encode(sentence)
            for begin in range(0, max(1, len(numbers)), max_length):
                parts.append((Item(i, sentence, ""), numbers[begin : begin + max_length], []))
        return batch_of(parts), [item.number for item, _, _ in parts]


def batch_of(pairs: Sequence[tuple[Item, Numbers, Numbers]]) -> Batch:
    """Pairs as a batch: each an item, and the subwords of source and target without marks."""
    source = np.full((1 + max(len(numbers) for _, numbers, _ in pairs), len(pairs)), PAD)
    target = np.full((2 + max(len(numbers) for _, _, numbers in pairs), len(pairs)), PAD)
    target[0] = BOS
    for column, (_, read, written) in enumerate(pairs):
        source[: len(read), column], source[len(read), column] = read, EOS
        target[1 : 1 + len(written), column], target[1 + len(written), column] = written, EOS
    return Batch(torch.from_numpy(source), torch.from_numpy(target), [item for item, _, _ in pairs])


def learn(texts: Iterable[str], kind: str, vocab_size: int, option: str = "data.subword") -> bytes:
    """A model of so many subwords, <pad>, <unk>, <s>, </s> and 256 bytes among them; the same texts give the same.

    ValueError if the texts do not have so many, or have more characters than that.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f" {text}" for text in texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",  # any other would change the text: ½ to 1⁄2, or two spaces to one
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # `encode` puts the space there
            character_coverage=1.0,
            byte_fallback=True,
            max_sentence_length=1 << 20,  # bytes; a longer one would be left out in silence
            num_threads=1,  # how sums are rounded depends on it
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
                f"data.vocab_size={vocab_size} is more than the training text has: with {option}={kind} it has "
                f"{found[1]} subwords; type data.vocab_size={found[1]} or less, or train on more text"
            ) from None
        if found := re.search(rf"{vocab_size} vs (\d+)", reason):
            raise ValueError(
                f"data.vocab_size={vocab_size} is too small: every character of the training text, the 256 bytes and "
                f"4 marks are {found[1]} subwords; type data.vocab_size={found[1]} or more"
            ) from None
        raise ValueError(f"no subwords can be learnt from the training text: {reason}") from None
    return model.getvalue()
