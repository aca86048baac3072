"""Translation by an encoder and a decoder (SRU 2017, section 4.4; SRU 2018, section 4.3; SRU++ 2021, section 4)."""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import NOT_FINITE, Task
from tasks.modules.attention_decoder import GlobalAttention
from tasks.modules.beam_search import beam_search
from tasks.modules.encoders import has_memory, remove_memory_limits, takes_option
from tasks.modules.layers import Dropout, apply_linear, is_plain
from tasks.modules.linear_cross_entropy import linear_cross_entropy
from tasks.run import console
from tasks.run.distributed import all_gather_object


class Translation(Task):
    """Encodes a sentence and predicts its translation word by word; metrics: perplexity, in a test BLEU and chrF too.

    A model with an option `source_size` is both encoder and decoder: each layer of its decoder attends to the encoder's
    output, and its encoder is not causal. Any other model gets global attention after its last layer. If it reads in
    one direction, the decoder starts from the encoder's last state, but not from a memory of steps. Attention sees the
    whole sentence, whatever memory_length says.

    A batch is (source (S, B), target (T, B), items), 0 for padding. A target begins with `bos` and ends with `eos`; an
    item has number (of its line), source and reference.

    Args:
        encoder: builds encoder and decoder from `input_size` and `bidirectional`; the decoder is one-directional.
        optimizer, scheduler: see Task.
        vocab_size, bos, eos: size of the vocabulary, and its words for begin and end of a sentence.
        decode: text of a list of words.
        bidirectional: the encoder reads in both directions.
        embedding_size: features of a word's embedding, and of the softmax's input.
        dropout: on embeddings, and between global attention and softmax. (The encoder has its own.)
        share_embeddings: source and target share one embedding matrix.
        tied: the softmax uses the target's embedding matrix, without bias.
        label_smoothing: probability spread over all words in training.
        beam: hypotheses kept while translating; 1 always takes the most likely word.
        length_penalty: alpha in the score log p / ((5 + length) / 6) ** alpha (Wu et al., 2016).
        validates_bleu: translate in validation too, which is slow; callbacks.best.monitor=val/bleu needs it.
        linear: computes the softmax's products; torch.nn.functional.linear or a faster one.
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
        self.bos, self.eos, self.decode = bos, eos, decode
        self.label_smoothing, self.beam, self.length_penalty = label_smoothing, beam, length_penalty
        self.validates_bleu = validates_bleu
        self.linear = linear
        self.source_embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.target_embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.softmax = nn.Linear(embedding_size, vocab_size, bias=not tied)
        for embedding in (self.source_embedding, self.target_embedding):
            with torch.no_grad():  # with tied weights, the first logits are as large as with torch's initialisation
                embedding.weight.normal_(std=embedding_size**-0.5)[0] = 0
        if share_embeddings:
            self.target_embedding.weight = self.source_embedding.weight
        if tied:
            self.softmax.weight = self.target_embedding.weight
        encoder = remove_memory_limits(encoder)
        has_decoder = takes_option(encoder, "source_size")
        direction = {"causal": False} if has_decoder else {}
        self.encoder = encoder(input_size=embedding_size, bidirectional=bidirectional, **direction)
        source_size = self.encoder.output_size
        self.passes_state = not has_decoder and not bidirectional
        self.decoder = (
            encoder(input_size=embedding_size, bidirectional=False, source_size=source_size)
            if has_decoder
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
        self.hypotheses: dict[int, tuple[str, str]] = {}  # {line: (translation, reference)}

    @property
    def encoders(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def encode(self, source: Tensor) -> tuple[Any, Any]:
        """The decoder's first state, and the memory that it attends to, for source (S, B)."""
        pad = source == 0
        h, state = self.encoder(self.dropout(self.source_embedding(source)), None, pad if pad.any() else None)
        return state if self.passes_state and not has_memory(state) else None, self.decoder.read(h, pad)

    def hidden(self, source: Tensor, target: Tensor) -> Tensor:
        """The softmax's input (T, B, embedding_size) after each word of target (T, B)."""
        state, memory = self.encode(source)
        h, _ = self.decoder(self.dropout(self.target_embedding(target)), state, None, memory)
        return self.readout(h)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (T, B, vocab_size) of the word after each word of target (T, B)."""
        return self.logits(self.hidden(source, target))

    def logits(self, h: Tensor) -> Tensor:
        return apply_linear(self.softmax, h, self.linear)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        source, target, items = batch
        expected = target[1:].flatten()
        places = expected.nonzero()[:, 0]  # without padding
        h = self.hidden(source, target[:-1]).flatten(0, 1).index_select(0, places)
        smoothing = self.label_smoothing if self.training else 0.0
        if is_plain(self.softmax):
            softmax = self.softmax.weight, self.softmax.bias
            loss = linear_cross_entropy(h, *softmax, expected[places], smoothing=smoothing, linear=self.linear)
        else:
            logits = self.softmax(h).to(torch.promote_types(h.dtype, torch.float32))
            loss = F.cross_entropy(logits, expected[places], reduction="sum", label_smoothing=smoothing)
        if not self.training and (self.validates_bleu or self.trainer.testing):
            translations = self.search(source, self.beam, self.length_penalty)
            for item, best in zip(items, translations, strict=True):
                self.hypotheses[item.number] = self.decode_line(best[0][1]), item.reference
        return loss / max(1, len(places)), {}, len(places)

    def on_fit_start(self) -> None:
        monitor = getattr(self.trainer.checkpoint_callback, "monitor", None)
        if monitor in ("val/bleu", "val/chrf") and not self.validates_bleu:
            raise ValueError(f"callbacks.best.monitor={monitor} needs translations: type task.validates_bleu=true")

    def decode_line(self, words: list[int]) -> str:
        """The text of a translation as one line; byte-level words may contain line ends."""
        return re.sub(r"[\r\n]", " ", self.decode(words))

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if stage == "train":  # no perplexity follows from a smoothed loss
            return {}
        values = {"perplexity": means["loss"].exp()}
        for part in all_gather_object(self.hypotheses):
            self.hypotheses |= part
        if self.hypotheses:
            from sacrebleu.metrics import BLEU, CHRF

            hypotheses, references = zip(*(self.hypotheses[line] for line in sorted(self.hypotheses)), strict=True)
            self.hypotheses = {}
            if stage == "test":
                self.write_artifact("hypotheses.txt", "".join(line + "\n" for line in hypotheses))
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

        A translation has at most 10 words more than twice the words of its source.
        """

        def step(words: Tensor, state: Any, memory: Any) -> tuple[Tensor, Any]:
            h, state = self.decoder.step(self.target_embedding(words), state, memory)
            return self.logits(self.readout(h)).float(), state

        return beam_search(
            step,
            *self.encode(source),
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
        """Translate the lines of a text; yields one line for each, or n_best lines, each after its score.

        Args:
            input: a text file with one sentence per line, or - for standard input (the default).
            beam: hypotheses kept while translating (5); 1 always takes the most likely word.
            length_penalty: values above 0 favour long translations (0.6).
            n_best: translations per line (1), at most beam; with 2 or more, each follows its score. The translation
                of an empty line is empty.
            batch_size: lines per batch (32).
            max_length: subwords translated at once (250). A longer line is translated in parts, which are joined;
                standard error names such lines.
        """
        if beam < 1:
            raise ValueError(f"beam={beam} must be a whole number, 1 (always the most likely word) or more; 5 is usual")
        if not 0 <= length_penalty <= 100:
            raise ValueError(f"length_penalty={length_penalty} must be 0 or more, up to 100; 0.6 is usual")
        if not 1 <= n_best <= beam:
            raise ValueError(f"n_best={n_best} must be 1 to beam={beam}")
        if min(batch_size, max_length) < 1:
            raise ValueError(f"batch_size={batch_size} and max_length={max_length} must be 1 or more")
        lines = vocabulary.lines(console.read(input), f"input={input}")
        for begin in range(0, len(lines), batch_size):
            group = lines[begin : begin + batch_size]
            batch, line_of_part = vocabulary.batch(group, max_length)
            translations = (
                best
                for source in batch.source.to(self.device).split(batch_size, dim=1)
                for best in self.search(source, beam, length_penalty, n_best)
            )
            parts_of_lines: list[list[list[tuple[float, list[int]]]]] = [[] for _ in group]
            for line, best in zip(line_of_part, translations, strict=True):
                parts_of_lines[line].append(best)
            for number, (line, parts) in enumerate(zip(group, parts_of_lines, strict=True), start=begin + 1):
                if len(parts) > 1:
                    print(f"line {number} is long: translated in {len(parts)} parts", file=sys.stderr)
                for ranked in zip(*parts, strict=False):
                    score = sum(score for score, _ in ranked) / len(ranked)
                    if score == -math.inf:
                        raise ValueError(NOT_FINITE)
                    text = " ".join(self.decode_line(words) for _, words in ranked)
                    if not line.strip():
                        score, text = 0.0, ""
                    yield f"{text}\n" if n_best == 1 else f"{score:.4f}\t{text}\n"
