"""Question answering by the DrQA reader (Chen et al., ACL 2017, section 3.2; SRU 2018, section 4.2).

`python -m tasks.squad DEV.json PREDICTIONS.json` prints EM and F1 of any predictions.
"""

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Task
from tasks.modules import squad_metrics
from tasks.modules.layers import Dropout, apply_linear
from tasks.run import console, errors
from tasks.run.distributed import all_gather_object, rank
from tasks.run.files import write_text


class QuestionAnswering(Task):
    """Finds the tokens of a passage that answer a question; metrics: exact match and F1 in per cent.

    Both texts are embedded and encoded. A token of the passage also has its features and a mean of the question's
    embeddings, weighed by likeness; the question becomes a weighted mean of its steps. A bilinear form of it with each
    step of the passage scores where the answer starts, another where it ends.

    A batch is (passage (T, B), features (T, B, num_features), question (Q, B), first (B,), last (B,), items), where 0
    is padding, first and last are -1 without a target, and an item has id, text, starts, ends and answers.

    Args:
        encoder: builds each of the two encoders from `input_size`.
        optimizer, scheduler: as in Task.
        vocab_size, num_features: of the data.
        vectors: word vectors (vocab_size, n), or None for embeddings of `embedding_size` that are learnt.
        tuned_words: how many of the vectors, from the start of the vocabulary, are trained; the others are fixed.
        dropout: on what the encoders return (they have their own, between layers). embedding_dropout: on embeddings.
        num_layers, concatenate_layers: with True, what each of so many layers returns is put side by side, as in DrQA,
            and `dropout` lies between the layers. False: what the encoder returns, as in the SRU's rows.
        max_answer: tokens of the longest answer, 15 as in the released code.
        linear: makes the alignment's products, as torch.nn.functional.linear or faster.
    """

    test_artifacts = ("predictions.json",)

    def __init__(
        self,
        *,
        encoder: Callable[..., Any],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
        vocab_size: int,
        num_features: int,
        vectors: Tensor | None,
        embedding_size: int = 300,
        tuned_words: int = 1000,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        num_layers: int = 0,
        concatenate_layers: bool = False,
        max_answer: int = 15,
        linear: Callable[..., Tensor] = F.linear,
    ) -> None:
        super().__init__(optimizer, scheduler)
        for name, value, low in (
            ("embedding_size", embedding_size, 1),
            ("tuned_words", tuned_words, 0),
            ("max_answer", max_answer, 1),
        ):
            if type(value) is not int or value < low:
                raise ValueError(f"task.{name}={value} must be a whole number, {low} or more")
        if not isinstance(concatenate_layers, bool):
            raise ValueError(f"task.concatenate_layers={concatenate_layers} must be true or false")
        self.embedding = Embedding(vocab_size, embedding_size, vectors, tuned_words)
        size = self.embedding.size
        self.likeness = nn.Linear(size, size)
        passage_size = 2 * size + num_features
        if concatenate_layers:
            if "num_layers" not in inspect.signature(encoder).parameters:
                raise ValueError(
                    "task.concatenate_layers=true needs a model of several layers; leave it out for this one"
                )
            encoder = partial(Layers, encoder, num_layers=num_layers, dropout=dropout)
        self.passage_encoder = encoder(input_size=passage_size)
        self.question_encoder = encoder(input_size=size)
        width = self.passage_encoder.output_size
        self.weight = nn.Linear(width, 1, bias=False)
        self.first = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, width, bias=False)
        self.embedding_dropout = Dropout(embedding_dropout)
        self.dropout = Dropout(dropout)
        self.max_answer = max_answer
        self.linear = linear
        self.found: dict[str, tuple[float, str]] = {}  # of each question: the best window's score and answer
        self.references: dict[str, list[str]] = {}

    @property
    def encoders(self) -> list[nn.Module]:
        return [self.passage_encoder, self.question_encoder]

    def forward(self, passage: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, T) of where the answer starts and ends; -inf at padding."""
        p, q = (self.embedding_dropout(self.embedding(words)) for words in (passage, question))
        p_pad, q_pad = passage == 0, question == 0
        x = torch.cat([p, self.attend_question(p, q, q_pad), features.to(p.dtype)], dim=2)
        # Without padding there is nothing to mask, and the encoders have less to do.
        h_p, _ = self.passage_encoder(x, None, p_pad if p_pad.any() else None)
        h_q, _ = self.question_encoder(q, None, q_pad if q_pad.any() else None)
        h_p, h_q = self.dropout(h_p), self.dropout(h_q)
        weights = at_least_float32(self.weight(h_q)).squeeze(2).masked_fill(q_pad, -math.inf).softmax(dim=0)
        summary = (weights.to(h_q.dtype)[..., None] * h_q).sum(dim=0)
        first, last = (
            at_least_float32(torch.einsum("tbn,bn->bt", h_p, form(summary).to(h_p.dtype))).masked_fill(
                p_pad.T, -math.inf
            )
            for form in (self.first, self.last)
        )
        return first, last

    def attend_question(self, p: Tensor, q: Tensor, q_pad: Tensor) -> Tensor:
        """For each step of p (T, B, n) the mean of q (Q, B, n), weighed by the likeness of the two."""
        p_keys, q_keys = (F.relu(apply_linear(self.likeness, a, self.linear)).transpose(0, 1) for a in (p, q))
        scores = at_least_float32(torch.bmm(p_keys, q_keys.transpose(1, 2)))
        weights = scores.masked_fill(q_pad.T[:, None], -math.inf).softmax(dim=2).to(q.dtype)
        return torch.bmm(weights, q.transpose(0, 1)).transpose(0, 1)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        passage, features, question, first, last, items = batch
        first_scores, last_scores = self(passage, features, question)
        if not self.training:
            self.keep(first_scores, last_scores, items)
        size = int((first >= 0).sum())
        losses = [
            F.cross_entropy(scores, target, ignore_index=-1, reduction="sum")
            for scores, target in ((first_scores, first), (last_scores, last))
        ]
        return sum(losses) / max(1, size), {}, size  # type: ignore[return-value]

    def spans(self, first: Tensor, last: Tensor, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """The best spans of at most `max_answer` tokens: sums of scores, first and last tokens, each (B, count)."""
        steps = first.shape[1]
        longest = min(self.max_answer, steps)
        ends = F.pad(last, (0, longest - 1), value=-math.inf).unfold(1, longest, 1)  # (B, T, longest)
        best = (first[..., None] + ends).flatten(1).topk(min(count, steps * longest), dim=1)
        start = best.indices // longest
        return best.values, start, start + best.indices % longest

    def keep(self, first: Tensor, last: Tensor, items: list[Any]) -> None:
        """Note the answers, of several windows of a passage the one with the best score."""
        values, starts, ends = (a[:, 0].tolist() for a in self.spans(first, last))
        for item, value, start, end in zip(items, values, starts, ends, strict=True):
            self.references[item.id] = item.answers
            if item.id not in self.found or value > self.found[item.id][0]:
                text = item.text[item.starts[start] : item.ends[end]] if len(item.starts) else ""
                self.found[item.id] = value, text

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if stage == "train":
            return {}
        for found, references in all_gather_object((self.found, self.references)):
            self.references |= references
            for id, best in found.items():  # two windows of a passage may be of two processes
                self.found[id] = max(best, self.found.get(id, best), key=lambda each: each[0])
        predictions = {id: self.found[id][1] for id in sorted(self.found)}
        evaluated = squad_metrics.evaluate(self.references, predictions)
        if stage == "test" and not rank():
            folder = Path(self.trainer.default_root_dir)
            write_text(folder / "predictions.json", json.dumps(predictions, ensure_ascii=False) + "\n")
        self.found, self.references = {}, {}
        return {name: torch.tensor(evaluated[name], device=self.device) for name in ("em", "f1")}

    @torch.no_grad()
    def predict(
        self,
        vocabulary: Any,
        *,
        question: str | None = None,
        passage: str | None = None,
        input: str | None = None,
        n_best: int = 1,
    ) -> Iterator[str]:
        """Answer a question on a passage; lines to be printed: probability, the answer's characters, its text.

        Args:
            question: what to answer.
            passage: the text that answers it.
            input: instead of a passage, a text file, or - for standard input.
            n_best: how many answers, the likeliest first (1).
        """
        if question is None or (passage is None) == (input is None):
            raise ValueError("give question='some text?' and passage='some text', or input=FILE for the passage")
        if n_best < 1:
            raise ValueError(f"n_best={n_best} must be 1 or more")
        question, passage = console.decode_argument(question), console.decode_argument(passage or "")
        if input is not None:
            passage = vocabulary.text(console.read(input), f"input={input}")
        best: dict[tuple[int, int], float] = {}  # characters: sum of scores
        # The best score of a token in all windows that hold it, by its first and by its last character.
        totals = np.full((2, len(passage) + 1), -math.inf)
        for batch in vocabulary.batches(passage, question):
            first, last = self(*(a.to(self.device) for a in (batch.passage, batch.features, batch.question)))
            spans = (a.tolist() for a in self.spans(first, last, n_best))
            for item, first_row, last_row, *rows in zip(batch.items, first.cpu(), last.cpu(), *spans, strict=True):
                for total, places, row in ((totals[0], item.starts, first_row), (totals[1], item.ends, last_row)):
                    total[places] = np.maximum(total[places], row[: len(places)].double().numpy())
                for value, start, end in zip(*rows, strict=True):
                    if value > -math.inf:
                        span = int(item.starts[start]), int(item.ends[end])
                        best[span] = max(value, best.get(span, -math.inf))
        total = float(torch.from_numpy(totals).logsumexp(1).sum())
        if not best or not math.isfinite(total):
            raise ValueError("the network gives no finite score: its checkpoint is damaged, or its training was")
        for (start, end), value in sorted(best.items(), key=lambda pair: -pair[1])[:n_best]:
            yield f"{math.exp(value - total):<8.4g}  {start}-{end}  {' '.join(passage[start:end].split())}\n"


def at_least_float32(scores: Tensor) -> Tensor:
    """For a softmax under mixed precision."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Embedding(nn.Module):
    """Embeddings of words, whose first is padding: learnt ones, or vectors of which the first few are tuned."""

    def __init__(self, vocab_size: int, embedding_size: int, vectors: Tensor | None, tuned: int) -> None:
        super().__init__()
        if vectors is None:
            self.words = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
            with torch.no_grad():  # as in classification
                self.words.weight.uniform_(-0.25, 0.25)[0] = 0
        else:
            self.words = nn.Embedding.from_pretrained(vectors, freeze=True)
        self.size = self.words.embedding_dim
        # <pad> and <unk> come first, and are not among the words that are counted.
        self.tuned = None if vectors is None or not tuned else nn.Parameter(vectors[: tuned + 2].clone())

    def forward(self, words: Tensor) -> Tensor:
        """(T, B, n) of words (T, B)."""
        fixed = self.words(words)
        if self.tuned is None:
            return fixed
        is_tuned = (words < len(self.tuned)) & (words > 0)
        # Of the others, padding's row is looked up: it gets no gradient.
        return torch.where(is_tuned[..., None], F.embedding(words * is_tuned, self.tuned, padding_idx=0), fixed)


class Layers(nn.Module):
    """Encoders of one layer each, one upon the other; their outputs side by side (DrQA's readers)."""

    def __init__(self, encoder: Callable[..., Any], *, input_size: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        layers = [encoder(input_size=input_size, num_layers=1)]
        for _ in range(num_layers - 1):
            layers.append(encoder(input_size=layers[-1].output_size, num_layers=1))
        self.layers = nn.ModuleList(layers)
        self.dropout = Dropout(dropout)
        self.output_size = sum(layer.output_size for layer in layers)

    def forward(self, x: Tensor, state: None, mask_pad: Tensor | None) -> tuple[Tensor, None]:
        outputs: list[Tensor] = []
        for layer in self.layers:
            x, _ = layer(self.dropout(x) if outputs else x, None, mask_pad)
            outputs.append(x)
        return torch.cat(outputs, dim=2), None


if __name__ == "__main__":
    console.use_utf8()
    errors.guard(lambda: squad_metrics.command(sys.argv[1:]))
