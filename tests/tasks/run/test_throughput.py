"""Measured times and speeds, with a clock that the test controls."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tasks.run import metrics, throughput


class Takes(torch.autograd.Function):
    """Advances the clock by `forward` seconds in forward and `backward` seconds in backward."""

    @staticmethod
    def forward(ctx, x, now, forward, backward):
        now[0] += forward
        ctx.taken = now, backward
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        now, backward = ctx.taken
        now[0] += backward
        return gradient, None, None, None


class Encoder(nn.Module):
    """Takes 3 s forward and 5 s backward."""

    def __init__(self, now):
        super().__init__()
        self.now, self.weight = now, nn.Parameter(torch.ones(1))

    def forward(self, x):
        return Takes.apply(x * self.weight, self.now, 3.0, 5.0), None


@pytest.fixture
def training(monkeypatch):
    """training(steps): the monitor after steps of 1 s for data, 3 + 1 s forward, 2 + 5 s backward, 8 s optimiser."""

    def trained(steps, **options):
        now, logged = [100.0], {}
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(throughput, "peak_memory", lambda device: 17.0)
        encoder = Encoder(now)
        module = SimpleNamespace(
            device=torch.device("cpu"), training=True, encoders=[encoder], batch_size=7, unit="examples",
            log_dict=logged.update,
        )  # fmt: skip
        progress = SimpleNamespace(is_last_batch=False, current=SimpleNamespace(ready=0))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress, batch_idx=0))
        trainer = SimpleNamespace(
            val_check_batch=4, num_training_batches=4, max_steps=-1, global_step=0, current_epoch=0, max_epochs=99,
            fit_loop=loop, accumulate_grad_batches=1, sanity_checking=False, state=SimpleNamespace(fn="fit"),
        )  # fmt: skip
        own = throughput.ThroughputMonitor(**options)
        trainer.should_stop, stops = False, []
        trainer.strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
        own.on_fit_start(trainer, module)
        own.on_train_start(trainer, module)
        for _ in range(steps):
            now[0] += 1
            own.on_train_batch_start(trainer, module)
            loss = Takes.apply(encoder(torch.ones(1))[0], now, 1.0, 2.0)
            own.on_before_backward(trainer, module)
            loss.backward()
            own.on_after_backward(trainer, module)
            now[0] += 8
            own.on_train_batch_end(trainer, module)
            stops.append(trainer.should_stop)
        logged["stops"], logged["state"] = stops, own.state_dict()
        own.on_validation_start(trainer, module)
        now[0] += 1000  # not counted
        own.on_validation_epoch_end(trainer, module)
        return own, logged

    return trained


def test_the_time_of_a_step_is_split_into_parts(training):
    own, logged = training(3 * throughput.ThroughputMonitor.SAMPLING)
    # Every 16th step, but not the first, which compiles.
    assert own.sampled == 3
    parts = {"data": 1000, "forward": 4000, "backward": 7000, "optimizer": 8000, "encoder": 8000}
    assert {name: logged[f"step_ms/{name}"] for name in parts} == pytest.approx(parts)
    assert own.encoder_share == pytest.approx(8 / 20)


def test_the_encoders_parameters_are_watched_in_timed_steps_only(training):
    for steps, is_timed in (
        (1, True),
        (2, False),
        (throughput.ThroughputMonitor.SAMPLING, False),
        (throughput.ThroughputMonitor.SAMPLING + 1, True),
    ):
        own, _ = training(steps)
        assert (own._mark is not None) == is_timed  # of the next step
        assert not own._step_hooks


def test_speed_is_examples_by_seconds_of_training(training):
    own, logged = training(6)
    assert logged["seconds"] == pytest.approx(6 * 20)
    assert logged["examples_per_second"] == own.speed == pytest.approx(6 * 7 / (6 * 20))
    assert logged["epoch"] == pytest.approx(6 / 4)
    assert logged["peak_memory_mb"] == 17.0


def test_the_record_has_the_clocks_numbers_for_an_epoch(training):
    own, logged = training(6)
    trainer = SimpleNamespace(
        callbacks=[own], checkpoint_callback=SimpleNamespace(best_model_path="", monitor="val/loss")
    )
    task = SimpleNamespace(unit="examples", device=torch.device("cpu"))
    found = metrics.result(trainer, task)
    assert found["seconds_per_epoch"] == pytest.approx(4 * 20)
    assert found["encoder_seconds_per_epoch"] == pytest.approx(4 * 8)
    assert found["examples_per_second"] == logged["examples_per_second"]
    assert (found["epochs"], found["best_epoch"]) == (1.5, None)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_is_in_megabytes():
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert throughput.peak_memory(torch.device("cpu")) == pytest.approx(kib / 1024, rel=0.05)


def test_training_ends_after_the_step_that_exceeds_max_seconds(training):
    _, logged = training(4, max_seconds=50)
    assert logged["stops"] == [False, False, True, True]
    assert training(4)[1]["stops"] == [False] * 4


def test_a_state_counts_the_examples_of_all_processes(training, monkeypatch):
    monkeypatch.setattr(throughput, "world_size", lambda: 3)
    _, logged = training(2)
    assert logged["state"]["examples"] == 3 * 2 * 7
