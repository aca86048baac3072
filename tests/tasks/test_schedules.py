"""The learning rate that each optimiser step gets, worked by hand, by torch and in a run of Lightning."""

import pytest
import pytorch_lightning as pl
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from tasks.schedules import cosine, decay, noam


def sgd(lr):
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule, count, *, lr=1.0, **options):
    """The rates in use at the steps, or epochs, 1 to count."""
    optimizer = sgd(lr)
    scheduler = schedule(optimizer, **options)["scheduler"]
    used = []
    for _ in range(count):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_noam_rises_with_n_and_falls_with_its_root():
    # 3 * 64^-0.5 = 0.375; 4^-1.5 = 0.125; at n = 4 both branches give 0.5; 16^-0.5 = 0.25.
    used = rates(noam, 16, lr=3.0, size=64, warmup=4)
    assert used[:4] == pytest.approx([0.375 * factor for factor in (0.125, 0.25, 0.375, 0.5)])
    assert [used[8], used[15]] == pytest.approx([0.375 / 3, 0.375 / 4])
    assert max(used) == used[3]


def test_cosine_rises_to_the_rate_and_falls_to_zero():
    # cos(pi n / 6) at n = 2, 3, 4 is 1/2, 0, -1/2; the factor after the warm-up is (1 + cos) / 1.5.
    assert rates(cosine, 8, lr=3.0, steps=6, warmup=2) == pytest.approx(
        [1.5, 3.0, 2.0, 1.0, 2 * (1 - 3**0.5 / 2), 0, 0, 0], abs=1e-12
    )
    assert rates(cosine, 4, steps=4, warmup=0) == pytest.approx([0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5, 0], abs=1e-12)


@pytest.mark.parametrize(("steps", "warmup"), [(50, 0), (50, 1), (50, 10), (50, 40), (50, 49), (1, 0)])
def test_cosine_is_torchs_with_its_first_rates_overwritten(steps, warmup):
    optimizer = sgd(0.01)
    group, chained = optimizer.param_groups[0], CosineAnnealingLR(optimizer, steps)
    expected = []
    for n in range(1, steps + 1):
        optimizer.step()
        chained.step()
        if n <= warmup:
            group["lr"] = 0.01 * n / warmup
        expected.append(group["lr"])
    assert rates(cosine, steps, lr=0.01, steps=steps, warmup=warmup) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_decay_begins_after_its_start():
    assert rates(decay, 5, lr=8.0, factor=0.5, start=2) == pytest.approx([8, 8, 4, 2, 1])
    assert rates(decay, 3, lr=8.0, factor=0.5, start=0) == pytest.approx([4, 2, 1])
    used = rates(decay, 177, factor=0.98, start=175)
    assert [used[0], *used[174:]] == pytest.approx([1, 1, 0.98, 0.9604])


CASES = [
    (noam, {"size": 64, "warmup": 3}),
    (cosine, {"steps": 9, "warmup": 3}),
    (decay, {"factor": 0.5, "start": 1}),
]


class Recorder(pl.LightningModule):
    """Notes the rate of every optimiser step."""

    def __init__(self, schedule, options):
        super().__init__()
        self.layer, self.schedule, self.options, self.used = torch.nn.Linear(1, 1), schedule, options, []

    def training_step(self, batch):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer, **self.options)}

    def on_before_optimizer_step(self, optimizer):
        self.used.append(optimizer.param_groups[0]["lr"])


def train(task, path, epochs, resumed=None):
    # 6 batches and 3 optimiser steps an epoch.
    data = torch.utils.data.DataLoader(torch.zeros(6, 1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, default_root_dir=path, enable_checkpointing=False, **quiet
    )
    trainer.fit(task, data, ckpt_path=resumed)
    trainer.save_checkpoint(path / "last.ckpt")
    return task.used


@pytest.mark.filterwarnings("ignore")  # few workers, no validation
@pytest.mark.parametrize(("schedule", "options"), CASES)
def test_lightning_uses_the_rate_of_each_step_and_a_resumed_run_goes_on_with_it(schedule, options, tmp_path):
    if schedule is decay:
        expected = [rate for rate in rates(schedule, 4, lr=0.1, **options) for _ in range(3)]
    else:
        expected = rates(schedule, 12, lr=0.1, **options)
    assert train(Recorder(schedule, options), tmp_path, 4) == pytest.approx(expected)
    assert train(Recorder(schedule, options), tmp_path, 2) == pytest.approx(expected[:6])
    resumed = train(Recorder(schedule, options), tmp_path, 4, tmp_path / "last.ckpt")
    assert resumed == pytest.approx(expected[6:])


@pytest.mark.parametrize(("schedule", "options"), CASES)
def test_the_rate_depends_on_the_counter_alone(schedule, options):
    scheduler = schedule(sgd(1.0), **options)["scheduler"]
    used = rates(schedule, 12, **options)
    assert [scheduler.lr_lambdas[0](done) for done in reversed(range(12))] == pytest.approx(used[::-1])


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (cosine, {"steps": 100, "warmup": 100}, "trainer.max_steps=100 task.scheduler.warmup=100: .* type"),
        (cosine, {"steps": -1, "warmup": 0}, "trainer.max_steps=-1 .* trainer.max_steps=400000"),
        (cosine, {"steps": 10, "warmup": -1}, "task.scheduler.warmup=-1: .* task.scheduler.warmup=16000"),
        (noam, {"size": 64, "warmup": 0}, "task.scheduler.warmup=0: both must be 1 or more; type"),
        (noam, {"size": 0, "warmup": 5}, "task.scheduler.size=0 .* type"),
        (decay, {"factor": 0, "start": 5}, "task.scheduler.factor=0 .* must lie in .0, 1."),
        (decay, {"factor": 0.98, "start": -1}, "task.scheduler.start=-1: .* type"),
    ],
)
def test_values_that_make_no_schedule_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        schedule(sgd(1.0), **options)
