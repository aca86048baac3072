"""Language modelling: the next token of one long text, by an encoder whose state goes on from segment to segment."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Task
from tasks.modules.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax
from tasks.modules.layers import Dropout
from tasks.run import console


class LanguageModelling(Task):
    """Embedding, encoder, softmax; metrics: bits per character, or perplexity of words.

    Truncated back-propagation through time: the state that a segment leaves, a memory of SRU++ included, is where the
    next one starts, without its gradient. A batch is (x (T, B), y (T, B), first): tokens, the tokens after them, and
    whether the streams begin here.

    Args:
        encoder: builds the encoder from `input_size`.
        optimizer, scheduler: as in Task.
        vocab_size, unit: of the data; unit is bytes, characters or words.
        embedding_size: features of a token's embedding; with cutoffs, of the most frequent ones.
        input_size: features that the encoder gets; None for embedding_size, else a matrix lies between.
        dropout: before the softmax. embedding_dropout: on the embeddings. (The encoder has its own, between layers.)
        tied: the softmax has the embedding's weights; a matrix lies between where the sizes differ.
        tie_projections: the matrices of embedding and softmax are the same too.
        cutoffs: of the clusters of an adaptive embedding and softmax, by frequency; none for one of each.
        div_value: each cluster has so many times fewer features than the one before.
        linear: makes the softmax's products, as torch.nn.functional.linear or faster.
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
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        tied: bool = False,
        tie_projections: bool = True,
        cutoffs: Sequence[int] = (),
        div_value: int = 4,
        linear: Callable[..., Tensor] = F.linear,
    ) -> None:
        super().__init__(optimizer, scheduler)
        for name, value in {"tied": tied, "tie_projections": tie_projections}.items():
            if not isinstance(value, bool):
                raise ValueError(f"task.{name}={value} must be true or false")
        if cutoffs and unit != "words":
            raise ValueError(
                f"task.cutoffs parts words by how frequent they are, {unit} are in another order: leave it out"
            )
        self.text_unit = unit
        input_size = embedding_size if input_size is None else input_size
        clusters: dict[str, Any] = {"cutoffs": tuple(cutoffs), "div_value": div_value}
        self.embedding = AdaptiveEmbedding(vocab_size, embedding_size, input_size, **clusters)
        self.encoder = encoder(input_size=input_size)
        if getattr(self.encoder, "bidirectional", False) or not getattr(self.encoder, "causal", True):
            raise ValueError(
                "a network of both directions sees the words that it is to predict; type bidirectional=false, and "
                "leave out model.bidirectional and model.causal"
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
        self.states: dict[str, Any] = {}  # what training and evaluation have come to

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """What the softmax sees (T, B, n) of tokens (T, B), and the encoder's state."""
        h, state = self.encoder(self.embedding_dropout(self.embedding(tokens)), state)
        return self.dropout(h), state

    def loss(self, batch: tuple[Tensor, Tensor, bool]) -> tuple[Tensor, dict[str, Tensor], int]:
        x, y, first = batch
        stage = "train" if self.training else "evaluation"
        h, state = self(x, None if first else self.states[stage])
        self.states[stage] = detach(state)
        return self.softmax(h, y).mean(), {}, y.numel()

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if self.text_unit == "words":
            return {"perplexity": means["loss"].exp()}
        return {"bpc": means["loss"] / math.log(2)}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.states.pop("evaluation", None)

    def own_state(self) -> dict[str, Any]:
        state = self.transfer_batch_to_device(self.states.get("train"), torch.device("cpu"), 0)
        return super().own_state() | {"state": state}

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        self.states["train"] = state["state"]

    def on_train_start(self) -> None:
        super().on_train_start()
        # What a checkpoint brought lies on the CPU.
        self.states = self.transfer_batch_to_device(self.states, self.device, 0)

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
        """Tokens that go on from a prompt, without end, a step each; in eval mode.

        The cost of a step does not grow: the encoder's state is all that is kept.

        Args:
            prompt: at least one token.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw among the so many likeliest; 0 for all.
            top_p: draw among the likeliest that together have this probability.
        """
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token to go on from")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be 0 (the likeliest) or above; 1 is as trained")
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k={top_k} must be 0 (all) or above, top_p={top_p} above 0 and at most 1")
        state = None
        for token in prompt:
            h, state = self.encoder.step(self.embedding(torch.tensor([token], device=self.device)), state)
        while True:
            scores = self.softmax.log_prob(h)[0].cpu()
            if temperature == 0:
                token = int(scores.argmax())
            else:
                token = draw((scores - scores.max()).double() / temperature, top_k, top_p, generator)
            yield token
            h, state = self.encoder.step(self.embedding(torch.tensor([token], device=self.device)), state)

    @torch.no_grad()
    def score(self, tokens: Sequence[int], segment: int = 512) -> Tensor:
        """Bits of each token but the first, given all before it; in eval mode."""
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
        """Go on from a prompt, or score the lines of a text; pieces of what is to be printed.

        Args:
            prompt: what to go on from.
            length: how many tokens to add (300).
            temperature: 1 as trained, lower is safer, 0 always takes the likeliest token.
            top_k: draw among the so many likeliest tokens; 0 for all.
            top_p: draw among the likeliest tokens that together have this probability; 1 for all.
            seed: of the draws (0).
            input: instead of a prompt, a text file, or - for standard input: bits per character, or perplexity of
                words, of each of its lines.
        """
        if (prompt is None) == (input is None):
            raise ValueError("give prompt='some text' to go on from, or input=FILE to score its lines")
        if input is not None:
            yield from self.scored_lines(vocabulary, input)
            return
        assert prompt is not None
        if not 0 <= length <= 10**9 or not 0 <= seed < 2**63:
            raise ValueError(
                f"length={length} must be 0 or above, up to 10**9, and seed={seed} 0 or above, below 2**63"
            )
        given = vocabulary.encode(console.decode_argument(prompt))
        tokens = self.generate(
            given,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed),
        )
        yield vocabulary.decode([*given, *itertools.islice(tokens, length)]) + "\n"

    def scored_lines(self, vocabulary: Any, path: str) -> Iterator[str]:
        """Each line behind its score, and the score of all; the text is read as if a line had ended before it."""
        lines = vocabulary.lines(content := console.read(path), f"input={path}")
        if not content or not lines:
            raise ValueError(f"input={path} is empty: there is no line to score")
        try:
            end = vocabulary.encode("\n")
        except ValueError:  # text8 has no lines
            end = vocabulary.encode(" ")
        tokens = [[*vocabulary.encode(line), *end] for line in lines]
        bits = self.score([*end, *itertools.chain.from_iterable(tokens)]).cpu().split([len(line) for line in tokens])

        def score(bits: Tensor) -> str:
            mean = float(bits.mean())
            return f"{2**mean:10.2f}" if self.text_unit == "words" else f"{mean:8.3f}"

        for line, of_line in zip(lines, bits, strict=True):
            printable = line.encode(errors="surrogateescape").decode(errors="replace")
            yield f"{score(of_line)}  {printable}\n"
        measure = "perplexity" if self.text_unit == "words" else "bits per character"
        yield f"{score(torch.cat(bits))}  {measure} of all\n"


def draw(scores: Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> int:
    """A token of the distribution that is proportional to exp(scores), cut to its likeliest ones."""
    probabilities, order = scores.softmax(0).sort(descending=True, stable=True)
    if top_k:
        probabilities = probabilities[:top_k]
    # The token with which the sum reaches top_p is the last to stay.
    before = probabilities.cumsum(0) / probabilities.sum() - probabilities / probabilities.sum()
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def detach(state: Any) -> Any:
    """A state of tensors, in tuples and lists, without its gradient."""
    if isinstance(state, Tensor):
        # A view of a few steps would keep, and save, all that it is a view of.
        is_part = state.untyped_storage().nbytes() > state.nbytes
        return state.detach().clone() if is_part else state.detach()
    return type(state)(map(detach, state)) if isinstance(state, tuple | list) else state
