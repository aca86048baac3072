"""Adaptive input and output layers of a language model: fewer features for rarer words, and fewer of them computed.

Words are counted from the most frequent one. Cutoffs c1 < ... < ck part them into the clusters [0, c1), [c1, c2), ...,
[ck, V); cluster i has embedding_size // div_value**i features a word. The softmax is that of Grave et al. (2017), the
embedding that of Baevski and Auli (2019); both may share their weights.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _cluster_sizes(
    vocab_size: int, embedding_size: int, cutoffs: Sequence[int], div_value: int
) -> tuple[list[int], list[int]]:
    """The clusters' bounds [0, c1, ..., V] and their features, checked."""
    bounds = [0, *cutoffs, vocab_size]
    if not all(type(c) is int for c in cutoffs) or bounds != sorted(set(bounds)):
        given, fitting = (
            "[" + ",".join(map(str, values)) + "]"
            for values in (cutoffs, sorted({c for c in cutoffs if type(c) is int and 1 <= c < vocab_size}))
        )
        raise ValueError(
            f"task.cutoffs={given} with a vocabulary of {vocab_size} words: every cutoff must lie between 1 and "
            f"{vocab_size - 1}, be a whole number and exceed the one before it; type task.cutoffs={fitting}"
        )
    if not isinstance(div_value, int) or div_value < 1:
        raise ValueError(f"task.div_value={div_value} must be a whole number from 1 on; type task.div_value=4")
    needed = div_value ** len(cutoffs)
    if embedding_size < needed:
        raise ValueError(
            f"task.embedding_size={embedding_size} leaves the rarest words no features, being divided by "
            f"task.div_value={div_value} for each of {len(cutoffs)} cutoffs: it must be {needed} or more; "
            f"type task.embedding_size={needed}, or task.div_value=1 for as many features everywhere"
        )
    return bounds, [embedding_size // div_value**i for i in range(len(bounds) - 1)]


def _uniform(rows: int, columns: int, variance: float) -> nn.Parameter:
    bound = (3 * variance) ** 0.5
    return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound))


def _word_weights(bounds: list[int], features: list[int]) -> nn.ParameterList:
    return nn.ParameterList(
        _uniform(high - low, e, 1 / e) for low, high, e in zip(bounds[:-1], bounds[1:], features, strict=True)
    )


def _projections(size: int, features: list[int]) -> nn.ParameterList:
    """For each cluster a matrix (size, features), or None where both are equal."""
    return nn.ParameterList([None if e == size else _uniform(size, e, 1 / size) for e in features])


def _rows_of_clusters(words: Tensor, cutoffs: Tensor) -> tuple[Tensor, ...]:
    """For each cluster the positions of its words among words (N,)."""
    clusters = torch.bucketize(words, cutoffs, right=True)
    return clusters.argsort(stable=True).split(clusters.bincount(minlength=len(cutoffs) + 1).tolist())


class AdaptiveEmbedding(nn.Module):
    """Vectors of words: tokens of any shape -> (*shape, output_size).

    A cluster whose features are not output_size many is projected to them, without a bias. Without cutoffs this is an
    ordinary embedding.

    Initial values are uniform with mean 0 and variance 1 / (features of the cluster) for the words and 1 / output_size
    for the projections. So, projected or not, a feature of a word's vector has variance 1 / output_size, and the
    vector a norm of about 1.

    Args:
        output_size: features of the vectors returned; None for embedding_size.
    """

    starts: Tensor  # of the clusters but the first

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        output_size: int | None = None,
        *,
        cutoffs: Sequence[int] = (),
        div_value: int = 4,
    ) -> None:
        super().__init__()
        self.vocab_size, self.embedding_size, self.div_value = vocab_size, embedding_size, div_value
        self.cutoffs = tuple(cutoffs)
        self.output_size = embedding_size if output_size is None else output_size
        self.bounds, self.features = _cluster_sizes(vocab_size, embedding_size, self.cutoffs, div_value)
        self.weights = _word_weights(self.bounds, self.features)
        self.projections = _projections(self.output_size, self.features)
        self.register_buffer("starts", torch.tensor(self.cutoffs, dtype=torch.int64), persistent=False)

    def _embed(self, tokens: Tensor, cluster: int) -> Tensor:
        x = F.embedding(tokens - self.bounds[cluster], self.weights[cluster])
        projection = self.projections[cluster]
        return x if projection is None else F.linear(x, projection)

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.cutoffs:
            return self._embed(tokens, 0)
        words = tokens.reshape(-1)
        rows = _rows_of_clusters(words, self.starts)
        # One cat and one gather back into the given order: autograd would copy a result that is filled in bit by bit.
        x = torch.cat([self._embed(words.index_select(0, r), i) for i, r in enumerate(rows)])
        return x.index_select(0, torch.cat(rows).argsort()).view(*tokens.shape, self.output_size)


class AdaptiveSoftmax(nn.Module):
    """Negative log-likelihoods of words in two steps: which cluster, then which word in it.

    The head's softmax goes over the words of cluster 0 and one logit for each further cluster, whose own softmax is
    computed only for the rows that need it. Logits of cluster i are E_i P_i^T h + b_i, with E_i (words, features) and
    P_i (input_size, features), which is absent where both sizes are equal. Without cutoffs this is an ordinary softmax
    with a bias. Initial values are those of AdaptiveEmbedding, which give logits a variance of about 1 when h has it;
    biases start at 0.

    Args:
        embedding_size: features of cluster 0; None for those of `tied`, or for input_size without it.
        tied: shares its E_i, and its P_i too if tie_projections; its sizes must be the same.
        linear: makes the products.
    """

    starts: Tensor  # of the clusters but the first

    def __init__(
        self,
        input_size: int,
        vocab_size: int,
        embedding_size: int | None = None,
        *,
        cutoffs: Sequence[int] = (),
        div_value: int = 4,
        tied: AdaptiveEmbedding | None = None,
        tie_projections: bool = True,
        linear: Callable[..., Tensor] = F.linear,
    ) -> None:
        super().__init__()
        self.linear = linear
        if embedding_size is None:
            embedding_size = input_size if tied is None else tied.embedding_size
        self.cutoffs = tuple(cutoffs)
        self.bounds, features = _cluster_sizes(vocab_size, embedding_size, self.cutoffs, div_value)
        if tied is not None:
            for name, own, other in (
                ("vocab_size", vocab_size, tied.vocab_size),
                ("cutoffs", list(self.cutoffs), list(tied.cutoffs)),
                ("embedding_size", embedding_size, tied.embedding_size),
                ("div_value", div_value, tied.div_value),
            ):
                if own != other:
                    raise ValueError(
                        f"the softmax has {name}={own} and the embedding that it is tied to {name}={other}: "
                        f"give both the same, or type task.tied=false"
                    )
            if tie_projections and input_size != tied.output_size:
                raise ValueError(
                    f"the softmax has input_size={input_size} and the embedding that it is tied to output_size="
                    f"{tied.output_size}, so they cannot share projections: type task.tie_projections=false"
                )
        self.weights = _word_weights(self.bounds, features) if tied is None else tied.weights
        self.projections = (
            _projections(input_size, features) if tied is None or not tie_projections else tied.projections
        )
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.register_buffer("starts", torch.tensor(self.cutoffs, dtype=torch.int64), persistent=False)
        if self.cutoffs:
            self.cluster_weight = _uniform(len(self.cutoffs), embedding_size, 1 / embedding_size)
            self.cluster_bias = nn.Parameter(torch.zeros(len(self.cutoffs)))

    def _logits(self, h: Tensor, cluster: int) -> Tensor:
        """Of a cluster's words; in cluster 0, then of the further clusters. In float32 at least, for the softmax."""
        weight, projection = self.weights[cluster], self.projections[cluster]
        bias = self.bias[self.bounds[cluster] : self.bounds[cluster + 1]]
        if cluster == 0 and self.cutoffs:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        logits = self.linear(h if projection is None else h @ projection, weight, bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """-log p(target), in the shape of targets (...,), from h (..., input_size)."""
        if h.shape[:-1] != targets.shape:
            raise ValueError(
                f"h of shape {tuple(h.shape)} needs targets {tuple(h.shape[:-1])}, not {tuple(targets.shape)}"
            )
        h, words = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
        if not self.cutoffs:
            return F.cross_entropy(self._logits(h, 0), words, reduction="none").view(targets.shape)
        tails = list(enumerate(_rows_of_clusters(words, self.starts)))[1:]
        heads = words
        for i, rows in tails:
            heads = heads.index_fill(0, rows, self.cutoffs[0] + i - 1)
        loss = F.cross_entropy(self._logits(h, 0), heads, reduction="none")
        for i, rows in tails:
            inside = words.index_select(0, rows) - self.bounds[i]
            tail = F.cross_entropy(self._logits(h.index_select(0, rows), i), inside, reduction="none")
            loss = loss.index_add(0, rows, tail)
        return loss.view(targets.shape)

    def log_prob(self, h: Tensor) -> Tensor:
        """log p of every word: h (N, input_size) -> (N, V)."""
        head = self._logits(h, 0).log_softmax(-1)
        words, clusters = head.split([self.bounds[1], len(self.cutoffs)], dim=-1)
        tails = [self._logits(h, i).log_softmax(-1) + clusters[:, i - 1 : i] for i in range(1, len(self.bounds) - 1)]
        return torch.cat([words, *tails], dim=-1)
