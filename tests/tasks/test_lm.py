"""Language modelling: the carried state, metrics by hand, resume within an epoch, generation and scores."""

import csv
import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch.nn import functional as F

import sru
import train
from tasks.lm import LanguageModelling, sample
from tasks.modules.encoders import detach
from tasks.run import errors

SMALL = (
    "task=lm", "depth=2", "width=16", "data.batch_size=4", "data.unroll=16", "data.eval_unroll=64",
    "trainer.limit_train_batches=10", "trainer.limit_val_batches=3", "trainer.limit_test_batches=3",
)  # fmt: skip
ENCODERS = {
    "sru": partial(sru.SRU, hidden_size=8, num_layers=2),
    "srupp": partial(sru.SRUppEncoder, hidden_size=8, num_layers=2, memory_length=64),
    "lstm": partial(sru.LSTM, hidden_size=8, num_layers=2),
    "gru": partial(sru.GRU, hidden_size=8, num_layers=2),
    "qrnn": partial(sru.QRNN, hidden_size=8, num_layers=2),
    "cnn": partial(sru.CNN, num_filters=4),
    "transformer": partial(sru.TransformerXL, hidden_size=8, num_layers=2, num_heads=2, memory_length=64),
}


def task_of(encoder="sru", vocab_size=11, **changes):
    known = {"unit": "characters", "embedding_size": 6, "optimizer": torch.optim.SGD} | changes
    return LanguageModelling(encoder=ENCODERS[encoder], vocab_size=vocab_size, **known).double()


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in row.items() if key.startswith(("step", "train/", "val/", "test/"))
             and not key.startswith("step_ms")} for row in csv.DictReader(file)
        ]  # fmt: skip


def state_of(folder, name="last"):
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_segments_are_one_text_and_the_loss_is_its_mean(encoder):
    task = task_of(encoder).eval()
    tokens = torch.randint(11, (25, 3))
    with torch.no_grad():
        h, _ = task(tokens[:-1])
        expected = F.cross_entropy(task.softmax.log_prob(h.flatten(0, 1)), tokens[1:].flatten(), reduction="none")
        sums, count = 0.0, 0
        for start in range(0, 24, 7):
            x, y = tokens[start : min(start + 7, 24)], tokens[start + 1 : start + 8]
            loss, _, size = task.loss((x, y, start == 0))
            sums, count = sums + loss * size, count + size
    assert count == 72
    torch.testing.assert_close(sums / count, expected.mean())


@pytest.mark.parametrize("encoder", ["sru", "srupp", "transformer"])
def test_no_gradient_passes_from_a_segment_to_the_one_before(encoder):
    task = task_of(encoder)
    first, second = torch.randint(11, (2, 6, 3))
    task.loss((first, first, True))
    state = task.state
    assert not any(leaf.requires_grad for leaf in torch.utils._pytree.tree_leaves(state) if leaf is not None)
    task.loss((second, second, False))[0].backward()


def test_training_and_evaluation_keep_states_of_their_own():
    task, tokens = task_of(), torch.randint(11, (3, 5, 2))
    task.loss((tokens[0], tokens[0], True))
    before = task.state.clone()
    task.eval()
    for first, batch in zip((True, False, False), tokens, strict=True):
        task.loss((batch[:, :1], batch[:, :1], first))
    assert torch.equal(task.state, before)


def test_a_first_segment_forgets():
    task, tokens = task_of().eval(), torch.randint(11, (2, 5, 2))
    alone = task.loss((tokens[1], tokens[1], True))[0]
    task.loss((tokens[0], tokens[0], True))
    assert torch.equal(task.loss((tokens[1], tokens[1], True))[0], alone)
    task.loss((tokens[0], tokens[0], True))
    assert not torch.equal(task.loss((tokens[1], tokens[1], False))[0], alone)


def test_metrics_follow_from_the_mean_of_all():
    """Perplexity is exp of the mean loss, not the mean of the segments' perplexities."""
    means = {"loss": torch.tensor(2.0, dtype=torch.float64)}
    assert task_of(unit="words").epoch_metrics(means, "val")["perplexity"] == pytest.approx(math.e**2)
    for unit in ("bytes", "characters"):
        assert task_of(unit=unit).epoch_metrics(means, "val")["bpc"] == pytest.approx(2 / math.log(2))


def test_a_uniform_model_costs_the_bits_of_its_vocabulary(configure, tmp_path, monkeypatch):
    """Through the trainer: with weights of 0 every character costs log2 V bits, whatever the segments' lengths."""

    def frozen(task):
        torch.nn.init.zeros_(task.softmax.weights[0])
        return torch.optim.SGD(task.parameters(), lr=0.0)

    monkeypatch.setattr(LanguageModelling, "configure_optimizers", frozen)
    cfg = configure(*SMALL[:-3], "epochs=1", "data.unroll=1000", "data.batch_size=64", "data.eval_unroll=977")
    train.run(cfg)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    vocab_size = instantiate(cfg.data).model_kwargs["vocab_size"]
    assert metrics["test/bpc"] == pytest.approx(math.log2(vocab_size), rel=1e-5)
    assert metrics["val/loss"] == pytest.approx(math.log(vocab_size), rel=1e-5)


@pytest.mark.parametrize("model", ["sru", "srupp", "lstm", "transformer"])
def test_resumed_within_an_epoch_equals_uninterrupted(configure, tmp_path, model):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = (*SMALL, f"model={model}", "dropout=0.2", "trainer.val_check_interval=4", "trainer.max_epochs=3")
    train.run(configure(f"run_dir={whole}", *words))
    # Stopped in the second epoch, after the first of its validations.
    train.run(configure(f"run_dir={parts}", *words, "trainer.max_steps=14"))
    assert state_of(parts)["global_step"] == 14
    (loader,) = state_of(parts)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader["position"] == 4
    torch.manual_seed(99)
    train.run(configure(f"run_dir={parts}", f"resume={parts}", *words))
    for name in ("last", "best"):
        one, two = state_of(whole, name), state_of(parts, name)
        assert one["global_step"] == two["global_step"]
        assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
        leaves = [torch.utils._pytree.tree_leaves(c["state"]) for c in (one, two)]
        assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True) if a is not None)
    # The file of the first part ends with its test, which the resumed run has replaced.
    assert rows(whole) == rows(parts)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["sru", "srupp", "transformer"])
def test_a_gpu_trains_in_half_precision_and_goes_on_within_an_epoch(configure, tmp_path, model):
    words = (*SMALL, f"model={model}", "trainer=gpu", "trainer.precision=16-mixed", "trainer.val_check_interval=4")
    train.run(configure(*words, "trainer.max_epochs=2", "trainer.max_steps=14"))
    train.run(configure(*words, "trainer.max_epochs=2", f"resume={tmp_path / 'run'}"))
    assert state_of(tmp_path / "run")["global_step"] == 20


def test_bfloat16_trains_as_float32_does(configure, tmp_path):
    words = (*SMALL, "width=64", "trainer.limit_train_batches=40", "epochs=1")
    losses = [
        train.run(configure(*words, f"run_dir={tmp_path / precision}", f"trainer.precision={precision}"))
        for precision in ("32-true", "bf16-mixed")
    ]
    assert losses[0] < 4
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[1] != losses[0]


def test_the_last_step_is_validated_and_saved_though_no_epoch_ends_there(configure, tmp_path):
    train.run(configure(*SMALL, "trainer.max_epochs=3", "trainer.max_steps=13"))
    assert state_of(tmp_path / "run")["global_step"] == 13
    assert [row["step"] for row in rows(tmp_path / "run") if row["val/loss"]] == ["10", "13"]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["epochs"] == 1.3
    train.run(configure(*SMALL, "trainer.max_epochs=3", "trainer.max_steps=-1", f"resume={tmp_path / 'run'}"))
    assert state_of(tmp_path / "run")["global_step"] == 30


def test_resumed_with_accumulated_gradients_and_a_schedule_equals_uninterrupted(configure, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = (*SMALL, "trainer.max_epochs=2", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4",
             "task.scheduler={_target_:tasks.schedules.noam,_partial_:true,size:16,warmup:4}")  # fmt: skip
    train.run(configure(f"run_dir={whole}", *words))
    train.run(configure(f"run_dir={parts}", *words, "trainer.max_steps=7"))
    train.run(configure(f"run_dir={parts}", f"resume={parts}", *words))
    one, two = state_of(whole), state_of(parts)
    assert one["global_step"] == two["global_step"] == 10
    assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
    assert one["lr_schedulers"][0]["_last_lr"] == two["lr_schedulers"][0]["_last_lr"]
    with pytest.raises(ValueError, match=r"val_check_interval=5 must be 1\.0 or a multiple of .*batches=2"):
        train.run(configure(*words, "trainer.val_check_interval=5"))


def test_training_stops_when_its_time_is_over_and_goes_on(configure, tmp_path, monkeypatch):
    words = (*SMALL, "trainer.max_epochs=2")
    train.run(configure(*words, "callbacks.clock.max_seconds=0.001"))
    assert state_of(tmp_path / "run")["global_step"] == 1
    train.run(configure(*words, "callbacks.clock.max_seconds=null", f"resume={tmp_path / 'run'}"))
    assert state_of(tmp_path / "run")["global_step"] == 20


def test_a_run_says_where_its_time_and_memory_went(configure, tmp_path):
    train.run(configure(*SMALL, "epochs=1"))
    outcome = json.loads((tmp_path / "run/metrics.json").read_text())
    parts = [outcome[f"step_ms/{part}"] for part in ("data", "forward", "backward", "optimizer")]
    assert all(part > 0 for part in parts)
    # All of a step is in one of its parts.
    assert sum(parts) < 1e3 * outcome["seconds"]  # one step of the ten is timed
    assert outcome["tokens_per_second"] == pytest.approx(640 / outcome["seconds"])
    assert outcome["peak_memory_mb"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sru", "srupp", "gru"])
def test_three_epochs_teach_much_of_the_embedded_text(configure, model):
    assert train.run(configure("task=lm", f"model={model}", "width=128", "epochs=3")) < 2.2


def test_accumulated_gradients_are_those_of_a_larger_batch(configure, tmp_path):
    """Two segments a step: the gradient is the mean of both, at weights that do not change in between."""
    words = (*SMALL[:-3], "epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "dropout=0",
             "trainer.limit_test_batches=1", "task.optimizer._target_=torch.optim.SGD",
             "trainer.gradient_clip_val=null", "trainer.accumulate_grad_batches=2")  # fmt: skip
    cfg = configure(*words)
    train.run(cfg)
    data = instantiate(cfg.data)
    torch.manual_seed(cfg.seed)
    import pytorch_lightning as pl

    pl.seed_everything(cfg.seed, verbose=False)
    data.setup()
    task = instantiate(cfg.task)(encoder=instantiate(cfg.model), **data.model_kwargs)
    losses = [task.loss(batch)[0] for batch in itertools.islice(data.train_dataloader(), 2)]
    torch.stack(losses).mean().backward()
    trained = state_of(tmp_path / "run")["state_dict"]
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(trained[name], (parameter - cfg.task.optimizer.lr * parameter.grad).detach())


@pytest.mark.parametrize(("encoder", "deviation"), [*((name, None) for name in ENCODERS), ("sru", 1.0)])
def test_generation_takes_the_likeliest_token_of_the_whole_text(encoder, deviation):
    """Step by step, with the state alone, as when the text so far is read again for each token."""
    task, text = task_of(encoder, embedding_deviation=deviation).eval(), [3, 1, 4]
    found = list(itertools.islice(task.generate(text, temperature=0), 12))
    for token in found:
        with torch.no_grad():
            h, _ = task(torch.tensor(text)[:, None])
        assert token == int(task.softmax.log_prob(h[-1]).argmax())
        text.append(token)


def test_the_encoder_reads_embeddings_of_the_chosen_deviation():
    tokens = torch.arange(2000)[:, None]
    plain, scaled = (task_of(vocab_size=2000, embedding_deviation=value) for value in (None, 1.0))
    assert plain.embed(tokens).std().item() == pytest.approx(6**-0.5, rel=0.03)
    assert scaled.embed(tokens).std().item() == pytest.approx(1.0, rel=0.03)


def test_draws_follow_the_distribution_and_its_cuts():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        counts = torch.zeros(4)
        for _ in range(4000):
            counts[sample(scores, **({"top_k": 0, "top_p": 1.0} | options), generator=generator)] += 1
        return (counts / 4000).tolist()

    assert frequencies() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert frequencies(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(top_p=0.1) == [1, 0, 0, 0]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_scores_are_bits_of_the_loss(encoder):
    task, tokens = task_of(encoder).eval(), torch.randint(11, (30,)).tolist()
    with torch.no_grad():
        text = torch.tensor(tokens)[:, None]
        expected = task.softmax(task(text[:-1])[0], text[1:])[:, 0] / math.log(2)
    torch.testing.assert_close(task.score(tokens, segment=7), expected)
    assert task.score([3]).numel() == task.score([]).numel() == 0


def test_a_network_that_sees_the_future_is_refused():
    for encoder in (
        partial(sru.SRU, hidden_size=8, bidirectional=True),
        partial(sru.LSTM, hidden_size=8, bidirectional=True),
        partial(sru.CNN, bidirectional=True),
        partial(sru.TransformerXL, hidden_size=8, bidirectional=True),
        partial(sru.SRUppEncoder, hidden_size=8, causal=False),
    ):
        with pytest.raises(ValueError, match="sees the words that it is to predict"):
            LanguageModelling(encoder=encoder, vocab_size=5, unit="bytes", embedding_size=6, optimizer=torch.optim.SGD)


def test_detached_keeps_the_form_of_a_state():
    state = (torch.ones(1, requires_grad=True), [torch.ones(2, requires_grad=True)], None)
    found = detach(state)
    assert isinstance(found, tuple)
    assert isinstance(found[1], list)
    assert found[2] is None
    assert not found[0].requires_grad
    assert not found[1][0].requires_grad


def test_a_state_keeps_nothing_but_itself():
    """A view of the last steps would be saved with all the steps that it is a view of."""
    encoder = partial(sru.SRUppEncoder, hidden_size=8, num_layers=2, memory_length=4)
    task = LanguageModelling(encoder=encoder, vocab_size=11, unit="bytes", embedding_size=6, optimizer=torch.optim.SGD)
    tokens = torch.randint(11, (16, 3))
    task.loss((tokens, tokens, True))
    memory = task.state[1]
    assert [len(a) for a in memory] == [4, 4]
    assert all(a.untyped_storage().nbytes() == a.nbytes for a in memory)


def test_the_state_of_a_checkpoint_goes_where_the_network_is():
    task, other = task_of(), task_of()
    task.loss((torch.randint(11, (5, 2)), torch.randint(11, (5, 2)), True))
    checkpoint = {}
    task.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    other._trainer = SimpleNamespace(overfit_batches=0.0)
    other.to("meta").on_train_start()
    assert other.state.device.type == "meta"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["task.cutoffs=[50,500]"], "characters are in another order"),
        (["data=bytes", "data.path={words}", "task.tied=5"], "task.tied=5 must be true or false"),
        (["data=pydoc"], "data=pydoc does not go with task=lm, which does not accept num_classes"),
        (["+model.batch_first=true"], "model.batch_first=True cannot be set in a run"),
        (["trainer.val_check_interval=1"], "type for example trainer.val_check_interval=0.25"),
        (["trainer.precision=16-true"], "trainer.precision=16-mixed"),
        (["data=bytes", "data.path={words}", "+data.min_count=5"], "data.min_count has no effect on bytes"),
        (["task.embedding_size=0"], "task.embedding_size=0 must be a whole number"),
        (["task.embedding_deviation=0"], "task.embedding_deviation=0 must be a number above 0"),
        (["callbacks.clock.max_seconds=nan"], "must be above 0"),
        (["data.unroll=20000"], "data.unroll=20000"),
        (["model.bidirectional=true"], "sees the words that it is to predict; type bidirectional=false"),
        (["bidirectional=true", "model=srupp"], "sees the words that it is to predict; type bidirectional=false"),
        (["model.rescale=maybe"], "model.rescale=maybe must be true, false or dropout"),
        (["bidirectional=both"], "bidirectional=both must be true or false"),
        (["callbacks.clock.max_seconds=0"], "callbacks.clock.max_seconds=0 must be above 0"),
    ],
)
def test_wrong_options_of_a_language_model_are_refused_at_once(configure, tmp_path, words, expected):
    (tmp_path / "words").write_text("some words " * 3000)
    words = [word.replace("{words}", str(tmp_path / "words")) for word in words]
    with pytest.raises((ValueError, InstantiationException)) as caught:
        train.run(configure("task=lm", *words))
    assert expected in errors.explain(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run(configure, tmp_path):
    with pytest.raises(ValueError, match=r"the train loss is (nan|inf) after 10 steps; type a lower"):
        train.run(configure(*SMALL, "epochs=1", "task.optimizer.lr=1e9", "trainer.gradient_clip_val=null"))
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("other", "told"), [(b"abxde" * 2000, "tokens had 4 entries and has 5"), (b"dcba" * 2000, "checksums differ")]
)
def test_another_text_is_refused_on_resume(configure, tmp_path, other, told):
    (tmp_path / "one").write_bytes(b"abcd" * 2000)
    (tmp_path / "two").write_bytes(other)
    words = (*SMALL, "data=bytes", "data.valid_bytes=400", "data.test_bytes=400", "epochs=1")
    train.run(configure(*words, f"data.path={tmp_path / 'one'}"))
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    (tmp_path / "one").write_bytes((tmp_path / "two").read_bytes())
    again = (f"data.path={tmp_path / 'one'}", f"resume={tmp_path / 'run'}", "trainer.max_epochs=2")
    with pytest.raises(ValueError, match=told):
        train.run(configure(*words, *again))
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before
