"""Translation by an encoder and a decoder (SRU 2017, section 4.4; SRU 2018, section 4.3; SRU++ 2021, section 4)."""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Task
from tasks.modules.attention_decoder import GlobalAttention, has_memory
from tasks.modules.beam_search import beam_search, check_search
from tasks.modules.layers import Dropout, apply_linear, is_plain
from tasks.modules.linear_cross_entropy import linear_cross_entropy
from tasks.run import console
from tasks.run.distributed import all_gather_object, rank
from tasks.run.files import write_text

MEMORY = ("memory_length", "eval_memory_length")  # options of what attends


class Translation(Task):
    """Reads a sentence, and writes its translation word by word; metrics: perplexity, and of a test BLEU and chrF.

    A model that takes `source_size` is encoder and decoder of its own: each of its decoder's layers attends to what the
    encoder returns, and the encoder sees all of a sentence. Any other gets global attention behind its last layer; if
    it reads one way, it hands its last state on to the decoder, but no memory of steps, for which there is attention.
    What attends looks back on all of a sentence, whatever its memory_length.

    A batch is (source (S, B), target (T, B), items) with 0 for padding, where target begins with `bos` and ends with
    `eos`, and an item has number (of its line), source and reference.

    Args:
        encoder: builds encoder and decoder from `input_size` and `bidirectional`; the decoder is of one direction.
        optimizer, scheduler: as in Task.
        vocab_size, bos, eos: of the data. decode: the text of words' numbers.
        bidirectional: whether the encoder reads both ways.
        embedding_size: features of a word's embedding, and of what the softmax sees.
        dropout: on embeddings, and between global attention and softmax. (The encoder has its own.)
        share_embeddings: source and target have one matrix.
        tied: the softmax has the target's, and no bias.
        label_smoothing: part of the probability that all words share in training.
        beam: sentences that are kept while translating; 1 always takes the likeliest word.
        length_penalty: alpha in the score log p / ((5 + length) / 6) ** alpha (Wu et al., 2016).
        validates_bleu: translate in validation too, which takes its time; callbacks.best.monitor=val/bleu needs it.
        linear: makes the softmax's products, as torch.nn.functional.linear or faster.
    """

    unit = "tokens"
    test_artifacts = ("hypotheses.txt",)

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
        share_embeddings: bool = True,
        tied: bool = True,
        label_smoothing: float = 0.0,
        beam: int = 5,
        length_penalty: float = 0.6,
        validates_bleu: bool = False,
        linear: Callable[..., Tensor] = F.linear,
    ) -> None:
        super().__init__(optimizer, scheduler)
        check_search(beam, length_penalty, "task.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"task.label_smoothing={label_smoothing} must be 0 or above, and below 1")
        if not callable(linear):
            raise ValueError(f"linear={linear} must name a product, as conf/config.yaml does; leave it out")
        flags = {"share_embeddings": share_embeddings, "tied": tied, "validates_bleu": validates_bleu}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"task.{name}={value} must be true or false")
        self.bos, self.eos, self.decode = bos, eos, decode
        self.label_smoothing, self.beam, self.length_penalty = label_smoothing, beam, length_penalty
        self.validates_bleu = validates_bleu
        self.linear = linear
        self.source_embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.target_embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.softmax = nn.Linear(embedding_size, vocab_size, bias=not tied)
        for embedding in (self.source_embedding, self.target_embedding):
            with torch.no_grad():  # so that the first logits of tied weights are of the size that torch's own have
                embedding.weight.normal_(std=embedding_size**-0.5)[0] = 0
        if share_embeddings:
            self.target_embedding.weight = self.source_embedding.weight
        if tied:
            self.softmax.weight = self.target_embedding.weight
        known = inspect.signature(encoder).parameters
        encoder = partial(encoder, **{name: None for name in MEMORY if name in known})
        attends = "source_size" in known
        whole = {"causal": False} if attends else {}
        self.encoder = encoder(input_size=embedding_size, bidirectional=bidirectional, **whole)
        source_size = self.encoder.output_size
        self.hands_on = not attends and not bidirectional
        self.decoder = (
            encoder(input_size=embedding_size, bidirectional=False, source_size=source_size)
            if attends
            else GlobalAttention(
                encoder,
                input_size=embedding_size,
                source_size=source_size,
                output_size=embedding_size,
                dropout=dropout,
            )
        )
        size = self.decoder.output_size
        self.readout = nn.Linear(size, embedding_size, bias=False) if size != embedding_size else nn.Identity()
        self.dropout = Dropout(dropout)
        self.hypotheses: dict[int, tuple[str, str]] = {}  # by line: the translation and the reference

    @property
    def encoders(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def read(self, source: Tensor) -> tuple[Any, Any]:
        """What the decoder starts from, and what it looks into, of source (S, B)."""
        pad = source == 0
        h, state = self.encoder(self.dropout(self.source_embedding(source)), None, pad if pad.any() else None)
        return state if self.hands_on and not has_memory(state) else None, self.decoder.read(h, pad)

    def write(self, source: Tensor, target: Tensor) -> Tensor:
        """What the softmax sees (T, B, embedding_size) after each of target (T, B)."""
        state, seen = self.read(source)
        h, _ = self.decoder(self.dropout(self.target_embedding(target)), state, None, seen)
        return self.readout(h)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (T, B, vocab_size) of the word after each of target (T, B)."""
        return self.logits(self.write(source, target))

    def logits(self, h: Tensor) -> Tensor:
        return apply_linear(self.softmax, h, self.linear)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        source, target, items = batch
        wanted = target[1:].flatten()
        places = wanted.nonzero()[:, 0]  # of what is no padding
        h = self.write(source, target[:-1]).flatten(0, 1).index_select(0, places)
        smoothing = self.label_smoothing if self.training else 0.0
        if is_plain(self.softmax):
            softmax = self.softmax.weight, self.softmax.bias
            loss = linear_cross_entropy(h, *softmax, wanted[places], smoothing=smoothing, linear=self.linear)
        else:
            logits = self.softmax(h).to(torch.promote_types(h.dtype, torch.float32))
            loss = F.cross_entropy(logits, wanted[places], reduction="sum", label_smoothing=smoothing)
        if not self.training and (self.validates_bleu or self.trainer.testing):
            self.keep(source, items)
        return loss / max(1, len(places)), {}, len(places)

    def on_fit_start(self) -> None:
        monitor = getattr(self.trainer.checkpoint_callback, "monitor", None)
        if monitor in ("val/bleu", "val/chrf") and not self.validates_bleu:
            raise ValueError(f"callbacks.best.monitor={monitor} needs translations: type task.validates_bleu=true")

    def keep(self, source: Tensor, items: list[Any]) -> None:
        """Translate, and note the translations."""
        for item, found in zip(items, self.search(source, self.beam, self.length_penalty), strict=True):
            self.hypotheses[item.number] = self.line(found[0][1]), item.reference

    def line(self, words: list[int]) -> str:
        """The text of a translation, in one line: any byte can be written, a line's end too."""
        return re.sub(r"[\r\n]", " ", self.decode(words))

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if stage == "train":  # whose loss is smoothed, and no perplexity follows from it
            return {}
        values = {"perplexity": means["loss"].exp()}
        for part in all_gather_object(self.hypotheses):
            self.hypotheses |= part
        if self.hypotheses:
            from sacrebleu.metrics import BLEU, CHRF

            hypotheses, references = zip(*(self.hypotheses[line] for line in sorted(self.hypotheses)), strict=True)
            self.hypotheses = {}
            if stage == "test" and not rank():
                folder = Path(self.trainer.default_root_dir)
                write_text(folder / "hypotheses.txt", "".join(line + "\n" for line in hypotheses))
            for metric in (BLEU(), CHRF()):
                score = metric.corpus_score(hypotheses, [references])
                values[score.name.lower()[:4]] = means["loss"].new_tensor(score.score)
                if stage == "test":
                    self.print(f"{score.name} {score.score:.2f}, sacrebleu {metric.get_signature()}")
        return values

    @torch.no_grad()
    def search(
        self, source: Tensor, beam: int, length_penalty: float, n_best: int = 1
    ) -> list[list[tuple[float, list[int]]]]:
        """The best translations of each sentence of source (S, B), with their scores, best first; in eval mode.

        Each has at most twice as many words as its source, and ten.
        """

        def step(words: Tensor, state: Any, seen: Any) -> tuple[Tensor, Any]:
            h, state = self.decoder.step(self.target_embedding(words), state, seen)
            return self.logits(self.readout(h)).float(), state

        return beam_search(
            step,
            *self.read(source),
            2 * (source != 0).sum(dim=0) + 10,
            bos=self.bos,
            eos=self.eos,
            beam=beam,
            length_penalty=length_penalty,
            n_best=n_best,
        )

    def predict(
        self,
        vocabulary: Any,
        *,
        input: str = "-",
        beam: int = 5,
        length_penalty: float = 0.6,
        n_best: int = 1,
        batch_size: int = 32,
        max_length: int = 250,
    ) -> Iterator[str]:
        """Translate the lines of a text; lines to be printed: one for each, or n_best, each behind its score.

        Args:
            input: a text file, or - for standard input (the default); a line is a sentence.
            beam: sentences that are kept while translating (5); 1 always takes the likeliest word.
            length_penalty: above 0 favours long translations (0.6).
            n_best: translations of a line (1), no more than beam; with 2 or more each stands behind its score. An empty
                line stays empty.
            batch_size: lines that are translated at once (32).
            max_length: subwords that are translated at once (250); a longer line is translated in such parts, which are
                put one behind the other, and standard error says which lines.
        """
        check_search(beam, length_penalty)
        if not 1 <= n_best <= beam:
            raise ValueError(f"n_best={n_best} must be 1 to beam={beam}")
        if min(batch_size, max_length) < 1:
            raise ValueError(f"batch_size={batch_size} and max_length={max_length} must be 1 or more")
        lines = vocabulary.lines(console.read(input), f"input={input}")
        for begin in range(0, len(lines), batch_size):
            group = lines[begin : begin + batch_size]
            batch, lines_of_parts = vocabulary.batch(group, max_length)
            found: list[list[list[tuple[float, list[int]]]]] = [[] for _ in group]
            searched = (
                best
                for source in batch.source.to(self.device).split(batch_size, dim=1)
                for best in self.search(source, beam, length_penalty, n_best)
            )
            for line, best in zip(lines_of_parts, searched, strict=True):
                found[line].append(best)
            for number, (line, parts) in enumerate(zip(group, found, strict=True), start=begin + 1):
                if len(parts) > 1:
                    print(f"line {number} is long: translated in {len(parts)} parts", file=sys.stderr)
                for of_parts in zip(*parts, strict=False):
                    score = sum(score for score, _ in of_parts) / len(of_parts)
                    if score == -math.inf:
                        raise ValueError("the network gives no number: its checkpoint is damaged, or its training was")
                    text = " ".join(self.line(words) for _, words in of_parts)
                    if not line.strip():  # which is nothing in any language
                        score, text = 0.0, ""
                    yield f"{text}\n" if n_best == 1 else f"{score:.4f}\t{text}\n"
