"""Sizes and flags of the data are checked once, in the configuration, for every class of data."""

import re

import pytest

from tasks.run import config_checks

WRONG = {
    "lm": ("batch_size=0", "unroll=-1", "unroll=2.5", "eval_unroll=0", "eval_batch_size=0", "+min_count=0"),
    "classification": ("fold=-1", "fold=10", "min_count=0", "lowercase=3"),
    "squad": ("window=0", "eval_batch_size=0", "lowercase=3"),
    "translation": ("vocab_size=0", "max_length=2.5", "eval_tokens_per_batch=0"),
    "speech": ("frames_per_batch=0", "eval_frames_per_batch=0", "volume=-1", "lowercase=yes", "+repeats=0"),
    "hybrid": ("delay=-1", "right=-1", "segment=0", "eval_frames_per_batch=0"),
}


@pytest.mark.parametrize(("task", "word"), [(task, word) for task, words in WRONG.items() for word in words])
def test_a_wrong_size_or_flag_is_refused_before_the_data_class_is_built(configure, task, word):
    key, value = word.lstrip("+").split("=")
    cfg = configure(f"task={task}", f"{'+' * (word[0] == '+')}data.{key}={value}")
    with pytest.raises(ValueError, match=rf"^data\.{key}={re.escape(value)} must be "):
        config_checks.check(cfg)
