"""Adaptive softmax (Grave et al., 2017) and adaptive embedding (Baevski and Auli, 2019) for large vocabularies.

Words are numbered by frequency, the most frequent first. Cutoffs c1 < ... < ck divide them into the clusters [0, c1),
[c1, c2), ..., [ck, V). Words of cluster i have embedding_size // div_value**i features. Softmax and embedding may share
their weights, which torch.nn.AdaptiveLogSoftmaxWithLoss does not support.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _cluster_sizes(
    vocab_size: int, embedding_size: int, cutoffs: Sequence[int], div_value: int
) -> tuple[list[int], list[int]]:
    """The clusters' bounds [0, c1, ..., V] and their numbers of features; ValueError for options that do not fit."""
    bounds = [0, *cutoffs, vocab_size]
    if not all(type(c) is int for c in cutoffs) or bounds != sorted(set(bounds)):
        raise ValueError(
            f"task.cutoffs={list(cutoffs)} with a vocabulary of {vocab_size} words: every cutoff must lie between 1 "
            f"and {vocab_size - 1}, be a whole number and exceed the one before it"
        )
    if not isinstance(div_value, int) or div_value < 1:
        raise ValueError(f"task.div_value={div_value} must be a whole number, 1 or more; type task.div_value=4")
    if embedding_size < (needed := div_value ** len(cutoffs)):
        raise ValueError(
            f"task.embedding_size={embedding_size} must be {needed} or more, as task.div_value={div_value} divides it "
            f"for each of {len(cutoffs)} cutoffs; task.div_value=1 gives all clusters the same number"
        )
    return bounds, [embedding_size // div_value**i for i in range(len(bounds) - 1)]


def _draw_uniform(rows: int, columns: int, variance: float) -> nn.Parameter:
    bound = (3 * variance) ** 0.5
    return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound))


def _word_weights(bounds: list[int], features: list[int]) -> nn.ParameterList:
    return nn.ParameterList(
        _draw_uniform(high - low, e, 1 / e) for low, high, e in zip(bounds[:-1], bounds[1:], features, strict=True)
    )


def _projections(size: int, features: list[int]) -> nn.ParameterList:
    """For each cluster a matrix (size, features), or None where both sizes are equal."""
    return nn.ParameterList([None if e == size else _draw_uniform(size, e, 1 / size) for e in features])


def _rows_of_clusters(words: Tensor, cutoffs: Tensor) -> tuple[Tensor, ...]:
    """For each cluster, the positions of its words in words (N,)."""
    clusters = torch.bucketize(words, cutoffs, right=True)
    return clusters.argsort(stable=True).split(clusters.bincount(minlength=len(cutoffs) + 1).tolist())


class AdaptiveEmbedding(nn.Module):
    """Vectors of words: tokens of any shape -> (*shape, output_size).

    Clusters with another number of features are projected to output_size, without bias. Without cutoffs this is an
    ordinary embedding.

    Initial values are uniform with mean 0 and variance 1 / (features of the cluster) for words, 1 / output_size for
    projections. With or without projection, a feature of a vector then has variance 1 / output_size, and a vector has
    a norm of about 1.

    Args:
        output_size: features of the vectors returned; None for embedding_size.
    """

    starts: Tensor  # first words of all clusters but cluster 0

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
        # One cat and one gather restore the order of the words; assigning slices would make autograd copy the result.
        x = torch.cat([self._embed(words.index_select(0, r), i) for i, r in enumerate(rows)])
        return x.index_select(0, torch.cat(rows).argsort()).view(*tokens.shape, self.output_size)


class AdaptiveSoftmax(nn.Module):
    """Negative log-likelihood of words in two steps: which cluster, then which word in it.

    The first softmax is over the words of cluster 0 and one logit for each further cluster. The softmax of a further
    cluster is computed only for targets in it. The logits of cluster i are E_i P_i^T h + b_i with E_i (words, features)
    and P_i (input_size, features); there is no P_i where both sizes are equal. Without cutoffs this is an ordinary
    softmax with bias. Initial values are as in AdaptiveEmbedding, which gives logits a variance of about 1 for h with
    variance 1; biases start at 0.

    Args:
        embedding_size: features of cluster 0; None for as many as `tied`, or for input_size without it.
        tied: an embedding of the same sizes that shares its E_i and, with tie_projections, its P_i.
        linear: computes the products.
    """

    starts: Tensor  # first words of all clusters but cluster 0

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
            embedding_size = input_size if tied is None else tied.features[0]
        self.cutoffs = tuple(cutoffs)
        self.bounds, features = _cluster_sizes(vocab_size, embedding_size, self.cutoffs, div_value)
        if tied is not None and tie_projections and input_size != tied.output_size:
            raise ValueError(
                f"the softmax has input_size={input_size} and the embedding output_size={tied.output_size}, so they "
                "cannot share projections: type task.tie_projections=false"
            )
        self.weights = _word_weights(self.bounds, features) if tied is None else tied.weights
        self.projections = (
            _projections(input_size, features) if tied is None or not tie_projections else tied.projections
        )
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.register_buffer("starts", torch.tensor(self.cutoffs, dtype=torch.int64), persistent=False)
        if self.cutoffs:
            self.cluster_weight = _draw_uniform(len(self.cutoffs), embedding_size, 1 / embedding_size)
            self.cluster_bias = nn.Parameter(torch.zeros(len(self.cutoffs)))

    def _logits(self, h: Tensor, cluster: int) -> Tensor:
        """Logits of a cluster's words, and for cluster 0 of the further clusters; at least float32, for the softmax."""
        weight, projection = self.weights[cluster], self.projections[cluster]
        bias = self.bias[self.bounds[cluster] : self.bounds[cluster + 1]]
        if cluster == 0 and self.cutoffs:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        logits = self.linear(h if projection is None else h @ projection, weight, bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """-log p(target), in the shape of targets (...,), from h (..., input_size)."""
        h, words = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
        if not self.cutoffs:
            return F.cross_entropy(self._logits(h, 0), words, reduction="none").view(targets.shape)
        tails = list(enumerate(_rows_of_clusters(words, self.starts)))[1:]
        head = words
        for i, rows in tails:
            head = head.index_fill(0, rows, self.cutoffs[0] + i - 1)
        loss = F.cross_entropy(self._logits(h, 0), head, reduction="none")
        for i, rows in tails:
            inside = words.index_select(0, rows) - self.bounds[i]
            tail = F.cross_entropy(self._logits(h.index_select(0, rows), i), inside, reduction="none")
            loss = loss.index_add(0, rows, tail)
        return loss.view(targets.shape)

    def log_prob(self, h: Tensor) -> Tensor:
        """log p of all words: h (N, input_size) -> (N, V)."""
        head = self._logits(h, 0).log_softmax(-1)
        words, clusters = head.split([self.bounds[1], len(self.cutoffs)], dim=-1)
        tails = [self._logits(h, i).log_softmax(-1) + clusters[:, i - 1 : i] for i in range(1, len(self.bounds) - 1)]
        return torch.cat([words, *tails], dim=-1)
