"""Question answering by the DrQA reader (Chen et al., ACL 2017, section 3.2; SRU 2018, section 4.2).

`python -m tasks.squad DEV.json PREDICTIONS.json` prints EM and F1 of a file of predictions.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import NOT_FINITE, Task
from tasks.modules import squad_metrics
from tasks.modules.encoders import takes_option
from tasks.modules.layers import Dropout, apply_linear, word_embedding
from tasks.run import console, errors
from tasks.run.distributed import all_gather_object


class QuestionAnswering(Task):
    """Finds the span of a passage that answers a question; metrics: exact match (em) and F1 in per cent.

    Passage and question are embedded and encoded. The encoder's input for a passage token also has the token's
    features and an attention over the question's embeddings. The question becomes one vector, a weighted mean of its
    encoder's steps. Two bilinear forms of this vector and each passage step score the start and the end of the answer.

    A batch is (passage (T, B), features (T, B, num_features), question (Q, B), first (B,), last (B,), items), 0 for
    padding. first and last are the answer's tokens, -1 for none; an item has id, text, starts, ends and answers.

    Args:
        encoder: builds each of the two encoders from `input_size`.
        optimizer, scheduler: see Task.
        vocab_size, num_features: number of words, and of a passage token's features.
        vectors: word vectors (vocab_size, n), or None to train embeddings.
        embedding_size: features of trained embeddings.
        embedding_deviation: root mean square of the word vectors' or embeddings' features at the start, as in
            Classification.
        tuned_words: number of most frequent words whose vectors are trained; the others stay fixed.
        dropout: on the encoders' outputs. (They have their own, between layers.) embedding_dropout: on the embeddings.
        num_layers, concatenate_layers: True: encoders of this many layers return the concatenated outputs of all
            layers, as in DrQA, with `dropout` between the layers. False: they return the output of the last layer, as
            in the SRU's rows of the table.
        max_answer: longest answer in tokens, 15 as in the released code.
        linear: computes the alignment's products; torch.nn.functional.linear or a faster one.
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
        embedding_deviation: float | None = None,
        tuned_words: int = 1000,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        num_layers: int = 0,
        concatenate_layers: bool = False,
        max_answer: int = 15,
        linear: Callable[..., Tensor] = F.linear,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.embedding = Embedding(vocab_size, embedding_size, vectors, tuned_words, embedding_deviation)
        size = self.embedding.size
        self.likeness = nn.Linear(size, size)
        passage_size = 2 * size + num_features
        if concatenate_layers:
            if not takes_option(encoder, "num_layers"):
                raise ValueError("task.concatenate_layers=true needs a model of several layers; leave it out")
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
        self.answers: dict[str, tuple[float, str]] = {}  # {question: (score, answer)} of its best window
        self.references: dict[str, list[str]] = {}

    @property
    def encoders(self) -> list[nn.Module]:
        return [self.passage_encoder, self.question_encoder]

    def forward(self, passage: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, T) of each token as the first and as the last of the answer; -inf at padding."""
        p, q = (self.embedding_dropout(self.embedding(words)) for words in (passage, question))
        p_pad, q_pad = passage == 0, question == 0
        x = torch.cat([p, self.attend_question(p, q, q_pad), features.to(p.dtype)], dim=2)
        # Encoders are faster without a mask.
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
        """For each step of p (T, B, n) a mean of the steps of q (Q, B, n), weighted by similarity."""
        p_keys, q_keys = (F.relu(apply_linear(self.likeness, a, self.linear)).transpose(0, 1) for a in (p, q))
        scores = at_least_float32(torch.bmm(p_keys, q_keys.transpose(1, 2)))
        weights = scores.masked_fill(q_pad.T[:, None], -math.inf).softmax(dim=2).to(q.dtype)
        return torch.bmm(weights, q.transpose(0, 1)).transpose(0, 1)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        passage, features, question, first, last, items = batch
        first_scores, last_scores = self(passage, features, question)
        if not self.training:
            self.record_answers(first_scores, last_scores, items)
        size = int((first >= 0).sum())
        losses = [
            F.cross_entropy(scores, target, ignore_index=-1, reduction="sum")
            for scores, target in ((first_scores, first), (last_scores, last))
        ]
        return sum(losses) / max(1, size), {}, size  # type: ignore[return-value]

    def spans(self, first: Tensor, last: Tensor, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """The best spans of at most `max_answer` tokens: their scores, first and last tokens, each (B, count)."""
        steps = first.shape[1]
        longest = min(self.max_answer, steps)
        ends = F.pad(last, (0, longest - 1), value=-math.inf).unfold(1, longest, 1)  # (B, T, longest)
        best = (first[..., None] + ends).flatten(1).topk(min(count, steps * longest), dim=1)
        start = best.indices // longest
        return best.values, start, start + best.indices % longest

    def record_answers(self, first: Tensor, last: Tensor, items: list[Any]) -> None:
        """Record the best answer of each question over all windows of its passage."""
        values, starts, ends = (a[:, 0].tolist() for a in self.spans(first, last))
        for item, value, start, end in zip(items, values, starts, ends, strict=True):
            self.references[item.id] = item.answers
            if item.id not in self.answers or value > self.answers[item.id][0]:
                text = item.text[item.starts[start] : item.ends[end]] if len(item.starts) else ""
                self.answers[item.id] = value, text

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if stage == "train":
            return {}
        for answers, references in all_gather_object((self.answers, self.references)):
            self.references |= references
            for id, best in answers.items():  # different processes may have read windows of the same passage
                self.answers[id] = max(best, self.answers.get(id, best), key=lambda each: each[0])
        predictions = {id: self.answers[id][1] for id in sorted(self.answers)}
        metrics = squad_metrics.evaluate(self.references, predictions)
        if stage == "test":
            self.write_artifact("predictions.json", json.dumps(predictions, ensure_ascii=False) + "\n")
        self.answers, self.references = {}, {}
        return {name: torch.tensor(metrics[name], device=self.device) for name in ("em", "f1")}

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
        """Answer a question about a passage; yields lines: probability, position in characters, text of the answer.

        Args:
            question: the question.
            passage: the text that contains the answer.
            input: instead of passage, a text file, or - for standard input.
            n_best: number of answers, the most likely first (1).
        """
        if question is None or (passage is None) == (input is None):
            raise ValueError("give question='some text?' and passage='some text', or input=FILE for the passage")
        if n_best < 1:
            raise ValueError(f"n_best={n_best} must be 1 or more")
        question, passage = console.decode_argument(question), console.decode_argument(passage or "")
        if input is not None:
            passage = vocabulary.text(console.read(input), f"input={input}")
        best: dict[tuple[int, int], float] = {}  # {(start, end) in characters: score}
        # The best score of each token over all windows: as first token by its start, as last token by its end.
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
            raise ValueError(NOT_FINITE)
        for (start, end), value in sorted(best.items(), key=lambda pair: -pair[1])[:n_best]:
            yield f"{math.exp(value - total):<8.4g}  {start}-{end}  {' '.join(passage[start:end].split())}\n"


def at_least_float32(scores: Tensor) -> Tensor:
    """Scores that are precise enough for a softmax, also under mixed precision."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Embedding(nn.Module):
    """Trained embeddings, or fixed word vectors of which the first `tuned` are trained; word 0 is padding."""

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        vectors: Tensor | None,
        tuned: int,
        deviation: float | None = None,
    ) -> None:
        super().__init__()
        self.words = word_embedding(vocab_size, vectors, 0, embedding_size, deviation)
        self.size = self.words.embedding_dim
        # <pad> and <unk> come first and are not counted.
        self.tuned = None if vectors is None or not tuned else nn.Parameter(self.words.weight[: tuned + 2].clone())

    def forward(self, words: Tensor) -> Tensor:
        """Vectors (T, B, n) of words (T, B)."""
        fixed = self.words(words)
        if self.tuned is None:
            return fixed
        is_tuned = (words < len(self.tuned)) & (words > 0)
        # The fixed words look up padding's row, which gets no gradient.
        return torch.where(is_tuned[..., None], F.embedding(words * is_tuned, self.tuned, padding_idx=0), fixed)


class Layers(nn.Module):
    """A stack of one-layer encoders that returns the concatenated outputs of all layers (DrQA)."""

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
    errors.guard(lambda: squad_metrics.main(sys.argv[1:]))
