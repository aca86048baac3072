"""Beam search: the likeliest sentences by a network that goes on word by word."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A step of decoding: logits (B, V) and the state, of words (B,), the state before, and what is known of the source.
Step = Callable[[Tensor, Any, Any], tuple[Tensor, Any]]


def check_search(beam: int, length_penalty: float, prefix: str = "") -> None:
    if type(beam) is not int or beam < 1:
        raise ValueError(
            f"{prefix}beam={beam} must be a whole number, 1 (always the likeliest word) or more; 5 is usual"
        )
    if type(length_penalty) not in (int, float) or not 0 <= length_penalty <= 100:
        raise ValueError(f"{prefix}length_penalty={length_penalty} must be 0 or more, up to 100; 0.6 is usual")


def select_rows(state: Any, rows: Tensor) -> Any:
    """These sequences of a state of tensors, in tuples and lists, whose dimension 1 is the batch."""
    if isinstance(state, Tensor):
        return state.index_select(1, rows)
    return type(state)(select_rows(part, rows) for part in state) if isinstance(state, tuple | list) else state


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
    """The best translations of each of N sentences with their scores, log p / ((5 + length) / 6) ** length_penalty.

    A sentence is done with its first `beam` translations; each has at most `limits` (N,) words. What is done leaves the
    batch; the others' translations do not depend on it. `step` gets beam sequences a sentence, one behind the other,
    and the source of each sentence once. state: of the N sentences, before the first word.
    """
    device = limits.device
    left = list(range(len(limits)))  # sentences that are not done
    rows = torch.arange(len(left), device=device).repeat_interleave(beam)
    state = select_rows(state, rows)
    words = torch.full((1, len(rows)), bos, device=device)
    scores = torch.full((len(left), beam), -math.inf, device=device)
    scores[:, 0] = 0  # all of a beam are one sentence yet
    done: list[list[tuple[float, list[int]]]] = [[] for _ in left]
    first = torch.zeros(1, dtype=torch.long, device=device)
    while left:
        logits, state = step(words[-1], state, source)
        log_p = logits.log_softmax(1)
        last = log_p[:, eos, None].unflatten(0, (-1, beam))
        log_p[:, [0, bos]] = -math.inf
        steps = len(words)
        # Twice as many as are kept: half of them may be ends.
        found, choices = (a.unflatten(0, (-1, beam)) for a in log_p.topk(min(2 * beam, log_p.shape[1])))
        ending = (limits <= steps)[:, None, None]
        if ending.any():
            found = torch.where(ending, torch.full_like(found, -math.inf).index_copy(2, first, last), found)
            choices = torch.where(ending, eos, choices)
        values, places = (scores[:, :, None] + found).flatten(1).topk(min(2 * beam, beam * found.shape[2]))
        parents, next_words = places // found.shape[2], choices.flatten(1).gather(1, places)
        ends = next_words == eos
        penalty = ((5 + steps) / 6) ** length_penalty
        for row, rank in (ends[:, :beam] & values[:, :beam].isfinite()).nonzero().tolist():
            sentence = words[1:, row * beam + int(parents[row, rank])].tolist()
            done[left[row]].append((float(values[row, rank]) / penalty, sentence))
        scores, order = values.masked_fill(ends, -math.inf).topk(beam)
        is_open = scores.isfinite().any(1).tolist()
        going_on = [row for row, i in enumerate(left) if len(done[i]) < beam and is_open[row]]
        kept = torch.tensor(going_on, device=device, dtype=torch.long)
        rows = (kept[:, None] * beam + parents.gather(1, order)[kept]).flatten()
        next_words = next_words.gather(1, order)[kept].flatten()
        state = select_rows(state, rows)
        if len(going_on) < len(left):
            source, limits = select_rows(source, kept), limits[kept]
        words = torch.cat([words[:, rows], next_words[None]])
        scores, left = scores[kept], [left[row] for row in going_on]
    # A network that gives no number translates nothing.
    return [sorted(found or [(-math.inf, [])], key=lambda pair: -pair[0])[:n_best] for found in done]
