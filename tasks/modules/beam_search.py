"""Beam search: the most likely sentences under a network that predicts word by word."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tasks.modules.encoders import select_rows

# One step of the decoder: (words (B,), state, source) -> (logits (B, V), state).
Step = Callable[[Tensor, Any, Any], tuple[Tensor, Any]]


def beam_search(
    step: Step,
    state: Any,
    source: Any,
    limits: Tensor,
    *,
    bos: int,
    eos: int,
    beam: int,
    length_penalty: float,
    n_best: int = 1,
) -> list[list[tuple[float, list[int]]]]:
    """The best translations of N sentences with their scores, log p / ((5 + length) / 6) ** length_penalty.

    The search for a sentence ends with its first `beam` complete translations or at `limits` (N,) words. Finished
    sentences leave the batch, which does not change the translations of the others. `state` is the state of the N
    sentences before their first word. `step` gets `beam` consecutive rows per sentence, but one source per sentence.
    """
    device = limits.device
    active = list(range(len(limits)))  # sentences that are not finished
    rows = torch.arange(len(active), device=device).repeat_interleave(beam)
    state = select_rows(state, rows)
    words = torch.full((1, len(rows)), bos, device=device)
    scores = torch.full((len(active), beam), -math.inf, device=device)
    scores[:, 0] = 0  # at first all rows of a beam are the same
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in active]
    first = torch.zeros(1, dtype=torch.long, device=device)
    while active:
        logits, state = step(words[-1], state, source)
        log_p = logits.log_softmax(1)
        last = log_p[:, eos, None].unflatten(0, (-1, beam))
        log_p[:, [0, bos]] = -math.inf
        steps = len(words)
        # Twice the beam, since up to half of the candidates end their sentence.
        candidates, choices = (a.unflatten(0, (-1, beam)) for a in log_p.topk(min(2 * beam, log_p.shape[1])))
        ending = (limits <= steps)[:, None, None]
        if ending.any():
            only_last = torch.full_like(candidates, -math.inf).index_copy(2, first, last)
            candidates = torch.where(ending, only_last, candidates)
            choices = torch.where(ending, eos, choices)
        count = candidates.shape[2]
        values, places = (scores[:, :, None] + candidates).flatten(1).topk(min(2 * beam, beam * count))
        parents, next_words = places // count, choices.flatten(1).gather(1, places)
        ends = next_words == eos
        penalty = ((5 + steps) / 6) ** length_penalty
        for row, rank in (ends[:, :beam] & values[:, :beam].isfinite()).nonzero().tolist():
            sentence = words[1:, row * beam + int(parents[row, rank])].tolist()
            finished[active[row]].append((float(values[row, rank]) / penalty, sentence))
        scores, order = values.masked_fill(ends, -math.inf).topk(beam)
        is_open = scores.isfinite().any(1).tolist()
        remaining = [row for row, i in enumerate(active) if len(finished[i]) < beam and is_open[row]]
        kept = torch.tensor(remaining, device=device, dtype=torch.long)
        rows = (kept[:, None] * beam + parents.gather(1, order)[kept]).flatten()
        next_words = next_words.gather(1, order)[kept].flatten()
        state = select_rows(state, rows)
        if len(remaining) < len(active):
            source, limits = select_rows(source, kept), limits[kept]
        words = torch.cat([words[:, rows], next_words[None]])
        scores, active = scores[kept], [active[row] for row in remaining]
    # A network that returns NaN finishes no translation.
    return [sorted(each or [(-math.inf, [])], key=lambda pair: -pair[0])[:n_best] for each in finished]
