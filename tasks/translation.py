"""Translation by a recurrent encoder and decoder with global attention (SRU 2017, section 4.4; Luong et al., 2015)."""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Dropout, Task
from tasks.record import write_text


class Translation(Task):
    """Reads a sentence, and writes its translation word by word; metrics: perplexity, and of a test BLEU and chrF.

    Each step of the decoder attends to all steps of the encoder, h W m over steps m; what it saw does not go into its
    next step (no input feeding), so that in training all steps of a layer are one call. An encoder of one direction
    hands its last state on to the decoder, but no memory of steps, which the decoder has its attention for.

    A batch is (source (S, B), target (T, B), items) with 0 for padding, where target begins with `bos` and ends with
    `eos`, and an item has number (of its line), source and reference.

    Args:
        encoder: builds encoder and decoder from `input_size` and `bidirectional`; the decoder is of one direction.
        optimizer, scheduler: as in Task.
        vocab_size, bos, eos: of the data. decode: the text of words' numbers.
        bidirectional: whether the encoder reads both ways.
        embedding_size: features of a word's embedding, and of what the softmax sees.
        dropout: on embeddings, and before the softmax. (The encoder has its own, between layers.)
        tied: source, target and softmax share one matrix; otherwise each has its own.
        label_smoothing: part of the probability that all words share in training.
        beam: sentences that are kept while translating; 1 always takes the likeliest word.
        length_penalty: alpha in the score log p / ((5 + length) / 6) ** alpha (Wu et al., 2016).
    """

    counted = "tokens"

    def __init__(
        self,
        *,
        encoder: Callable[..., Any],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
        vocab_size: int,
        bos: int,
        eos: int,
        decode: Callable[[Iterable[int]], str],
        bidirectional: bool,
        embedding_size: int,
        dropout: float = 0.0,
        tied: bool = True,
        label_smoothing: float = 0.0,
        beam: int = 5,
        length_penalty: float = 0.6,
    ) -> None:
        super().__init__(optimizer, scheduler)
        check_search(beam, length_penalty, "task.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"task.label_smoothing={label_smoothing} must be 0 or above, and below 1")
        if not isinstance(tied, bool):
            raise ValueError(f"task.tied={tied} must be true or false")
        self.bos, self.eos, self.decode = bos, eos, decode
        self.label_smoothing, self.beam, self.length_penalty = label_smoothing, beam, length_penalty
        self.source_embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.target_embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.softmax = nn.Linear(embedding_size, vocab_size, bias=not tied)
        for embedding in (self.source_embedding, self.target_embedding):
            with torch.no_grad():  # so that the first logits of tied weights are of the size that torch's own have
                embedding.weight.normal_(std=embedding_size**-0.5)[0] = 0
        if tied:
            self.target_embedding.weight = self.softmax.weight = self.source_embedding.weight
        self.encoder = encoder(input_size=embedding_size, bidirectional=bidirectional)
        self.decoder = encoder(input_size=embedding_size, bidirectional=False)
        self.hands_on = not bidirectional
        self.attention = nn.Linear(self.decoder.output_size, self.encoder.output_size, bias=False)
        self.combination = nn.Linear(self.decoder.output_size + self.encoder.output_size, embedding_size, bias=False)
        self.dropout = Dropout(dropout)
        self.hypotheses: dict[int, tuple[str, str]] = {}  # of a test, by line: the translation and the reference

    @property
    def encoders(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def read(self, source: Tensor) -> tuple[Any, Tensor, Tensor]:
        """What the decoder starts from, the steps (S, B, n) that it attends to, and which are padding (S, B)."""
        pad = source == 0
        h, state = self.encoder(self.dropout(self.source_embedding(source)), None, pad if pad.any() else None)
        return state if self.hands_on and not has_memory(state) else None, h, pad

    def attend(self, h: Tensor, memory: Tensor, pad: Tensor) -> Tensor:
        """What the softmax sees (T, B, n) of the decoder's h (T, B, m)."""
        scores = torch.einsum("tbn,sbn->bts", self.attention(h), memory)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores.masked_fill(pad.T[:, None], -math.inf).softmax(dim=2).to(memory.dtype)
        context = torch.einsum("bts,sbn->tbn", weights, memory)
        return self.dropout(torch.tanh(self.combination(torch.cat([context, h], dim=2))))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (T, B, vocab_size) of the word after each of target (T, B)."""
        state, memory, pad = self.read(source)
        h, _ = self.decoder(self.dropout(self.target_embedding(target)), state)
        return self.softmax(self.attend(h, memory, pad))

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        source, target, items = batch
        wanted = target[1:].flatten()
        logits = self(source, target[:-1]).flatten(0, 1)
        size = int((wanted != 0).sum())
        smoothing = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            wanted,
            ignore_index=0,
            reduction="sum",
            label_smoothing=smoothing,
        )
        if not self.training and self.trainer.testing:
            self.keep(source, items)
        return loss / max(1, size), {}, size

    def keep(self, source: Tensor, items: list[Any]) -> None:
        """Translate, and note the translations."""
        for item, found in zip(items, self.search(source, self.beam, self.length_penalty), strict=True):
            self.hypotheses[item.number] = self.line(found[0][1]), item.reference

    def line(self, words: list[int]) -> str:
        """The text of a translation, in one line: any byte can be written, a line's end too."""
        return re.sub(r"[\r\n]", " ", self.decode(words))

    def derived(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if stage == "train":  # whose loss is smoothed, and no perplexity follows from it
            return {}
        values = {"perplexity": means["loss"].exp()}
        if stage == "test":
            from sacrebleu.metrics import BLEU, CHRF

            hypotheses, references = zip(*(self.hypotheses[line] for line in sorted(self.hypotheses)), strict=True)
            self.hypotheses = {}
            folder = Path(self.trainer.default_root_dir)
            write_text(folder / "hypotheses.txt", "".join(line + "\n" for line in hypotheses))
            for metric in (BLEU(), CHRF()):
                score = metric.corpus_score(hypotheses, [references])
                values[score.name.lower()[:4]] = means["loss"].new_tensor(score.score)
                self.print(f"{score.name} {score.score:.2f}, sacrebleu {metric.get_signature()}")
        return values

    @torch.no_grad()
    def search(
        self, source: Tensor, beam: int, length_penalty: float, n_best: int = 1
    ) -> list[list[tuple[float, list[int]]]]:
        """The best translations of each sentence of source (S, B), with their scores, best first; in eval mode.

        A sentence is done with its first `beam` translations; each has at most twice as many words as its source, and
        ten. What is done leaves the batch; the others' translations do not depend on it.
        """
        state, memory, pad = self.read(source)
        limits = (2 * (~pad).sum(dim=0) + 10).tolist()
        left = list(range(source.shape[1]))  # sentences that are not done
        rows = torch.arange(len(left), device=source.device).repeat_interleave(beam)
        state, memory, pad = chosen((state, memory, pad), rows)
        words = source.new_full((1, len(rows)), self.bos)
        scores = torch.full((len(left), beam), -math.inf, device=source.device)
        scores[:, 0] = 0  # all of a beam are one sentence yet
        done: list[list[tuple[float, list[int]]]] = [[] for _ in left]
        while left:
            h, state = self.decoder.step(self.target_embedding(words[-1]), state)
            log_p = self.softmax(self.attend(h[None], memory, pad)[0]).float().log_softmax(dim=1)
            log_p[:, [0, self.bos]] = -math.inf
            steps = len(words)
            ending = torch.tensor([limits[i] <= steps for i in left], device=source.device).repeat_interleave(beam)
            is_other = torch.arange(log_p.shape[1], device=source.device) != self.eos
            log_p = log_p.masked_fill(ending[:, None] & is_other, -math.inf)
            # Twice as many as are kept: half of them may be ends.
            values, places = (scores.flatten()[:, None] + log_p).unflatten(0, (-1, beam)).flatten(1).topk(2 * beam)
            parents, next_words = places // log_p.shape[1], places % log_p.shape[1]
            ends = next_words == self.eos
            penalty = ((5 + steps) / 6) ** length_penalty
            for row, rank in (ends[:, :beam] & values[:, :beam].isfinite()).nonzero().tolist():
                sentence = words[1:, row * beam + int(parents[row, rank])].tolist()
                done[left[row]].append((float(values[row, rank]) / penalty, sentence))
            scores, order = values.masked_fill(ends, -math.inf).topk(beam)
            going_on = [row for row, i in enumerate(left) if len(done[i]) < beam and bool(scores[row].isfinite().any())]
            kept = torch.tensor(going_on, device=source.device, dtype=torch.long)
            rows = (kept[:, None] * beam + parents.gather(1, order)[kept]).flatten()
            next_words = next_words.gather(1, order)[kept].flatten()
            state, memory, pad = chosen((state, memory, pad), rows)
            words = torch.cat([words[:, rows], next_words[None]])
            scores, left = scores[kept], [left[row] for row in going_on]
        return [sorted(found, key=lambda pair: -pair[0])[:n_best] for found in done]

    def predict(
        self,
        vocabulary: Any,
        *,
        input: str = "-",
        beam: int = 5,
        length_penalty: float = 0.6,
        n_best: int = 1,
        batch_size: int = 32,
    ) -> Iterator[str]:
        """Translate the lines of a text; lines to be printed: one for each, or n_best, each behind its score.

        Args:
            input: a text file, or - for standard input (the default); a line is a sentence.
            beam: sentences that are kept while translating (5); 1 always takes the likeliest word.
            length_penalty: above 0 favours long translations (0.6).
            n_best: translations of a line (1), no more than beam; with 2 or more each stands behind its score.
            batch_size: lines that are translated at once (32).
        """
        check_search(beam, length_penalty)
        if not 1 <= n_best <= beam or batch_size < 1:
            raise ValueError(f"n_best={n_best} must be 1 to beam={beam}, and batch_size={batch_size} 1 or more")
        try:
            content = sys.stdin.buffer.read() if input == "-" else Path(input).expanduser().read_bytes()
            lines = content.decode("utf-8-sig").removesuffix("\n").split("\n") if content else []
        except OSError as error:
            raise FileNotFoundError(f"input={input} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"input={input} is no text in UTF-8: {error}") from error
        for begin in range(0, len(lines), batch_size):
            group = lines[begin : begin + batch_size]
            source = vocabulary.batch(group).source.to(self.device)
            for line, found in zip(group, self.search(source, beam, length_penalty, n_best), strict=True):
                for score, words in found:
                    text = self.line(words) if line.strip() else ""  # nothing is nothing in any language
                    yield f"{text}\n" if n_best == 1 else f"{score:.4f}\t{text}\n"


def has_memory(state: Any) -> bool:
    """Whether a state has, beside numbers of its own, lists of what an attention looks back on."""
    return isinstance(state, list) or (isinstance(state, tuple) and any(isinstance(part, list) for part in state))


def check_search(beam: int, length_penalty: float, prefix: str = "") -> None:
    if type(beam) is not int or beam < 1:
        raise ValueError(
            f"{prefix}beam={beam} must be a whole number, 1 (always the likeliest word) or more; 5 is usual"
        )
    if type(length_penalty) not in (int, float) or not 0 <= length_penalty < math.inf:
        raise ValueError(f"{prefix}length_penalty={length_penalty} must be 0 or more; 0.6 is usual")


def chosen(state: Any, rows: Tensor) -> Any:
    """These sequences of a state of tensors, in tuples and lists, whose dimension 1 is the batch."""
    if isinstance(state, Tensor):
        return state.index_select(1, rows)
    return type(state)(chosen(part, rows) for part in state) if isinstance(state, tuple | list) else state
