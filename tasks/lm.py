"""Language modelling: predict the next token of one long text (SRU 2018, section 4.4; SRU++ 2021, section 4)."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import StatefulTask
from tasks.modules.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax
from tasks.modules.encoders import detach, sees_future
from tasks.modules.layers import Dropout, check_deviation
from tasks.run import console


class LanguageModelling(StatefulTask):
    """Embedding, encoder and softmax; metrics: bits per character, or perplexity for words.

    The text is read in segments. Each starts from the encoder's final state of the one before it (for SRU++ its
    memory), without gradient. A batch is (x (T, B), y (T, B), first): tokens, the token after each, and whether this
    is the first segment of the text.

    Args:
        encoder: builds the encoder from `input_size`.
        optimizer, scheduler: see Task.
        vocab_size, unit: number of tokens and their kind: bytes, characters or words.
        embedding_size: features of an embedding; with cutoffs, of the most frequent tokens.
        input_size: features of the encoder's input, projected from the embedding; None for embedding_size.
        embedding_deviation: the embeddings, whose features have a variance of 1 / input_size at the start, are
            multiplied for this standard deviation; None leaves them.
        dropout: before the softmax. embedding_dropout: on the embeddings. (The encoder has its own, between layers.)
        tied: the softmax uses the weights of the embedding, behind a projection where the sizes differ.
        tie_projections: embedding and softmax share their projections too.
        cutoffs: word ranks that separate the clusters of an adaptive embedding and softmax; empty for plain ones.
        div_value: each cluster has this many times fewer features than the one before it.
        linear: computes the softmax's products; torch.nn.functional.linear or a faster one.
    """

    unit = "tokens"

    def __init__(
        self,
        *,
        encoder: Callable[..., Any],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
        vocab_size: int,
        unit: str,
        embedding_size: int,
        input_size: int | None = None,
        embedding_deviation: float | None = None,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        tied: bool = False,
        tie_projections: bool = True,
        cutoffs: Sequence[int] = (),
        div_value: int = 4,
        linear: Callable[..., Tensor] = F.linear,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if cutoffs and unit != "words":
            raise ValueError(f"task.cutoffs needs words sorted by frequency; {unit} are in another order: leave it out")
        self.text_unit = unit
        input_size = embedding_size if input_size is None else input_size
        clusters: dict[str, Any] = {"cutoffs": tuple(cutoffs), "div_value": div_value}
        self.embedding = AdaptiveEmbedding(vocab_size, embedding_size, input_size, **clusters)
        check_deviation(embedding_deviation)
        self.embedding_scale = None if embedding_deviation is None else embedding_deviation * input_size**0.5
        self.encoder = encoder(input_size=input_size)
        if sees_future(self.encoder):
            raise ValueError(
                "a bidirectional network sees the words that it is to predict; type bidirectional=false, and leave out "
                "model.bidirectional and model.causal"
            )
        self.softmax = AdaptiveSoftmax(
            self.encoder.output_size,
            vocab_size,
            embedding_size if tied or cutoffs else None,
            **clusters,
            tied=self.embedding if tied else None,
            tie_projections=tie_projections,
            linear=linear,
        )
        self.embedding_dropout = Dropout(embedding_dropout)
        self.dropout = Dropout(dropout)
        self.evaluation_state: Any = None

    def embed(self, tokens: Tensor) -> Tensor:
        """The encoder's input (..., input_size) for tokens of any shape."""
        x: Tensor = self.embedding_dropout(self.embedding(tokens))
        return x if self.embedding_scale is None else x * self.embedding_scale

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The softmax's input (T, B, n) for tokens (T, B), and the encoder's state."""
        h, state = self.encoder(self.embed(tokens), state)
        return self.dropout(h), state

    def loss(self, batch: tuple[Tensor, Tensor, bool]) -> tuple[Tensor, dict[str, Tensor], int]:
        x, y, first = batch
        name = "state" if self.training else "evaluation_state"
        h, state = self(x, None if first else getattr(self, name))
        setattr(self, name, detach(state))
        return self.softmax(h, y).mean(), {}, y.numel()

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if self.text_unit == "words":
            return {"perplexity": means["loss"].exp()}
        return {"bpc": means["loss"] / math.log(2)}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.evaluation_state = None

    @torch.no_grad()
    def generate(
        self,
        prompt: Sequence[int],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Tokens that continue a prompt, one per step, without end; in eval mode.

        Each step takes the same time: it needs only the encoder's state, not the text before it.

        Args:
            prompt: at least one token.
            temperature: divides the logits; 0 always takes the most likely token.
            top_k: sample from this many most likely tokens; 0 for all.
            top_p: sample from the most likely tokens that together have this probability.
        """
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token to continue")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be 0 (the most likely token) or above; 1 is as trained")
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k={top_k} must be 0 (all) or above, top_p={top_p} above 0 and at most 1")
        state = None
        for token in prompt:
            h, state = self.encoder.step(self.embed(torch.tensor([token], device=self.device)), state)
        while True:
            scores = self.softmax.log_prob(h)[0].cpu()
            if temperature == 0:
                token = int(scores.argmax())
            else:
                token = sample((scores - scores.max()).double() / temperature, top_k, top_p, generator)
            yield token
            h, state = self.encoder.step(self.embed(torch.tensor([token], device=self.device)), state)

    @torch.no_grad()
    def score(self, tokens: Sequence[int], segment: int = 512) -> Tensor:
        """Bits of each token but the first, given all tokens before it; in eval mode."""
        if len(tokens) < 2:
            return torch.zeros(0, device=self.device)
        text = torch.tensor(tokens, device=self.device)[:, None]
        state, bits = None, []
        for x, y in zip(text[:-1].split(segment), text[1:].split(segment), strict=True):
            h, state = self(x, state)
            bits.append(self.softmax(h, y)[:, 0] / math.log(2))
        return torch.cat(bits)

    def predict(
        self,
        vocabulary: Any,
        *,
        prompt: str | None = None,
        input: str | None = None,
        length: int = 300,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Continue a prompt, or score the lines of a text; yields the text to print.

        Args:
            prompt: the text to continue.
            length: number of tokens to add (300).
            temperature: 1 as trained; lower values choose likelier tokens, 0 always the most likely one.
            top_k: sample from this many most likely tokens; 0 for all.
            top_p: sample from the most likely tokens that together have this probability; 1 for all.
            seed: seed of the random draws (0).
            input: instead of a prompt, a text file, or - for standard input: print bits per character, or perplexity
                for words, of each line.
        """
        if (prompt is None) == (input is None):
            raise ValueError("give prompt='some text' to continue, or input=FILE to score its lines")
        if input is not None:
            yield from self.score_lines(vocabulary, input)
            return
        assert prompt is not None
        if not 0 <= length <= 10**9 or not 0 <= seed < 2**63:
            raise ValueError(
                f"length={length} must be 0 or above, up to 10**9, and seed={seed} 0 or above, below 2**63"
            )
        start = vocabulary.encode(console.decode_argument(prompt))
        generator = torch.Generator().manual_seed(seed)
        tokens = self.generate(start, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield vocabulary.decode([*start, *itertools.islice(tokens, length)]) + "\n"

    def score_lines(self, vocabulary: Any, path: str) -> Iterator[str]:
        """Each line after its score, then the score of the whole text, which is read as if a line end came before."""
        lines = vocabulary.lines(content := console.read(path), f"input={path}")
        if not content or not lines:
            raise ValueError(f"input={path} is empty: there is no line to score")
        try:
            end = vocabulary.encode("\n")
        except ValueError:  # text8 has no lines
            end = vocabulary.encode(" ")
        tokens = [[*vocabulary.encode(line), *end] for line in lines]
        bits = self.score([*end, *itertools.chain.from_iterable(tokens)]).cpu()

        def format_mean(bits: Tensor) -> str:
            mean = float(bits.mean())
            return f"{2**mean:10.2f}" if self.text_unit == "words" else f"{mean:8.3f}"

        for line, line_bits in zip(lines, bits.split([len(line) for line in tokens]), strict=True):
            printable = line.encode(errors="surrogateescape").decode(errors="replace")
            yield f"{format_mean(line_bits)}  {printable}\n"
        measure = "perplexity" if self.text_unit == "words" else "bits per character"
        yield f"{format_mean(bits)}  {measure} of all\n"


def sample(scores: Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> int:
    """A token with probability proportional to exp(score), among the most likely ones only."""
    probabilities, order = scores.softmax(0).sort(descending=True, stable=True)
    if top_k:
        probabilities = probabilities[:top_k]
    # The token with which the sum reaches top_p is the last one to stay.
    before = probabilities.cumsum(0) / probabilities.sum() - probabilities / probabilities.sum()
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
