"""Batches of one number or of one budget: what is in them, their order, and where an epoch goes on."""

import numpy as np
import pytest
import torch

from data.batching import Batches

SIZES = np.random.default_rng(0).integers(1, 300, 1000)
WAYS = [{"batch_size": 8}, {"budget": 1200}]
ways = pytest.mark.parametrize("way", WAYS, ids=["number", "budget"])


def batches(way, seed=3, sizes=SIZES):
    """Batches that are lists of (example, size)."""
    return Batches(list, list(enumerate(sizes)), sizes, seed=seed, **way)


@ways
def test_every_example_comes_once_an_epoch_in_an_order_of_seed_and_epoch(way):
    one, two, other = batches(way), batches(way), batches(way, seed=4)
    first, second = list(one), list(one)
    assert sorted(example for batch in first for example in batch) == list(enumerate(SIZES))
    assert len(first) == len(second) == len(one)
    assert first != second
    assert (list(two), list(two)) == (first, second)
    assert list(other) != first
    waste = sum(max(size for _, size in batch) * len(batch) for batch in first) / SIZES.sum() - 1
    assert waste < 0.06
    sizes = [batch[0][1] for batch in first]
    assert sizes != sorted(sizes)


def test_a_number_makes_batches_of_that_number():
    assert len(batches(WAYS[0])) == 125
    assert {len(batch) for batch in batches(WAYS[0])} == {8}
    assert [len(batch) for batch in batches(WAYS[0], None, [1] * 20)] == [8, 8, 4]


def test_a_budget_holds_the_largest_size_times_the_number():
    for batch in batches(WAYS[1]):
        assert max(size for _, size in batch) * len(batch) <= 1200
    assert max(len(batch) for batch in batches(WAYS[1])) > 50
    assert sum(len(batch) < 4 for batch in batches(WAYS[1])) <= 1
    assert [len(batch) for batch in batches({"budget": 12}, None, [3, 3, 3, 3, 4, 4, 4, 5, 7])] == [4, 3, 1, 1]


def test_an_example_above_the_budget_is_a_batch_of_its_own():
    found = list(batches({"budget": 10}, None, [25, 5, 5, 11, 0]))
    assert found == [[(4, 0), (1, 5)], [(2, 5)], [(3, 11)], [(0, 25)]]
    assert len(list(batches({"budget": 10}, 1, [11, 12, 13]))) == 3


@ways
def test_every_epoch_has_as_many_batches(way):
    for seed in range(5):
        shuffled = batches(way, seed)
        assert {len(list(shuffled)) for _ in range(3)} == {len(shuffled)} == {len(batches(way, None))}


@ways
def test_evaluation_goes_by_size_and_keeps_the_order_of_the_same(way):
    found = [example for batch in batches(way, None) for example in batch]
    assert found == sorted(enumerate(SIZES), key=lambda example: (example[1], example[0]))


@ways
def test_no_examples_make_no_batch(way):
    for seed in (None, 3):
        empty = batches(way, seed, [])
        assert (len(empty), list(empty)) == (0, [])


@ways
def test_an_epoch_goes_on_where_it_was_left(way):
    whole, cut = batches(way), batches(way)
    expected = [list(whole), list(whole)]
    iterator = iter(cut)
    seen = [next(iterator) for _ in range(50)]
    resumed = batches(way)
    resumed.load_state_dict(cut.state_dict())
    assert seen + list(resumed) == expected[0]
    assert list(resumed) == expected[1]
    finished = batches(way)
    finished.load_state_dict(resumed.state_dict())
    assert list(finished) == list(whole)  # the third epoch


@ways
@pytest.mark.parametrize(("limit", "length"), [(7, 7), (5000, None), (0.5, 0.5)])
def test_a_limited_epoch_ends_at_its_limit(way, limit, length):
    cut, whole = batches(way), batches(way)
    first, second = list(whole), list(whole)
    cut.limit(limit)
    assert cut.length == (length if isinstance(length, int) else int((length or 1) * len(whole)))
    cut.load_state_dict({"epoch": 0, "position": cut.length})
    assert list(cut) == second
    cut.load_state_dict({"epoch": 0, "position": cut.length - 1})
    assert list(cut) == first[cut.length - 1 :]


def read_part(rank, address, found):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    training = Batches(list, range(47), range(47), batch_size=5, seed=1)
    evaluation = Batches(list, range(47), range(47), batch_size=5)
    lengths = [len(training), len(evaluation)]
    found.put((rank, lengths, [list(training), list(training)], list(evaluation)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_each_process_takes_its_part(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    processes = [context.Process(target=read_part, args=(i, f"file://{tmp_path}/meet", found)) for i in range(2)]
    for process in processes:
        process.start()
    parts = sorted(found.get() for _ in processes)
    for process in processes:
        process.join()
    alone = Batches(list, range(47), range(47), batch_size=5, seed=1)
    for epoch in range(2):
        every = list(alone)
        assert [parts[0][2][epoch], parts[1][2][epoch]] == [every[0::2], every[1::2]]
    assert [lengths for _, lengths, _, _ in parts] == [[5, 5], [5, 5]]
    evaluated = [batch for pair in zip(parts[0][3], parts[1][3], strict=True) for batch in pair]
    assert evaluated == list(Batches(list, range(47), range(47), batch_size=5))


@pytest.mark.parametrize("seed", [1, None], ids=["training", "evaluation"])
@ways
def test_all_processes_take_as_many_batches_and_each_example_comes_once(monkeypatch, way, seed):
    """Of three processes, and of numbers of batches that leave other remainders."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    lengths = set()
    for size in (24, 40, 41, 1000):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            part = batches(way, seed, SIZES[:size])
            parts.append(list(part))
            assert len(part) == len(parts[-1]) == len(parts[0])
        assert all(batch for part in parts for batch in part)
        assert sorted(e for part in parts for batch in part for e in batch) == list(enumerate(SIZES[:size]))
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
        lengths.add(len(batches(way, seed, SIZES[:size])) % 3)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert len(lengths) > 1


def test_too_few_examples_for_the_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="2 examples are too few for 3 processes"):
        Batches(list, range(2), range(2), batch_size=5)
