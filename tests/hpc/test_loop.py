import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpc import loop
from hpc.errors import UserError
from hpc.loop import NonFiniteLoss, Plan, SavingConfig, TrainState, train, train_step
from hpc.optimizers import OptimizerConfig
from hpc.run_dir import RunDir


class PlainEngine:
    """An engine without DeepSpeed: what the loop asks of one."""

    def __init__(self, module):
        self.module, self.zero_stage, self.device = module, 0, torch.device("cpu")
        self.topology = SimpleNamespace(is_main=True)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
        self.rates = []

    def forward(self, x):
        return self.module(x)

    def backward(self, loss):
        self.optimizer.zero_grad()
        loss.backward()

    def step(self, lr):
        self.rates.append(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


class Quadratic:
    def __init__(self, bad_step=None):
        torch.manual_seed(0)
        self.module, self.bad_step, self.moved = nn.Linear(3, 1), bad_step, 0

    def batches(self, start_step):
        step = start_step
        while True:
            keys = [f"s{step}-{i}" for i in range(20)]
            yield SimpleNamespace(step=step, keys=keys, wait_seconds=0.0)
            step += 1

    def forward(self, model, batch):
        return {"y": model(torch.full((4, 3), 1.0 + batch.step % 3))}

    def loss(self, outputs, batch):
        scale = math.nan if batch.step == self.bad_step else 1.0
        return outputs["y"].square().mean() * scale

    def after_step(self):
        self.moved += 1

    def measures(self, outputs):
        return {"spread": float(outputs["y"].std())}

    def epochs_done(self, step):
        return step / 10

    def state_dict(self):
        return {"version": 1}

    def load_state_dict(self, state):
        assert state == {"version": 1}


PLAN = Plan(10, 4, 4, OptimizerConfig(name="sgd", lr=0.01, warmup_steps=2), SavingConfig(every_steps=5, keep=2))


@pytest.fixture
def run(tmp_path):
    return RunDir.prepare(tmp_path / "run", "seed: 0\n", "f")


def _train(run, task, state=None):
    lines = []
    engine = PlainEngine(task.module)
    state = state or TrainState()
    loop.restore(task, engine, run, state, warn=lines.append)
    train(task, engine, PLAN, run, SimpleNamespace(log=lines.append), state, None)
    return engine, lines


def test_logs_saves_and_schedules(run):
    task = Quadratic()
    engine, lines = _train(run, task)
    assert [line["step"] for line in lines] == [1, 4, 8, 10] and task.moved == 10
    named = {"step", "epoch", "samples_seen", "loss", "lr", "images_per_s", "data_wait_share", "spread"}
    assert set(lines[0]) == named and lines[-1]["samples_seen"] == 40 and lines[-1]["epoch"] == 1.0
    assert engine.rates == [PLAN.learning_rate(step) for step in range(10)] and engine.rates[1] == 0.01
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-00000005", "step-00000010"]


def test_resumes_from_the_newest_whole_checkpoint(run):
    _train(run, Quadratic())
    whole = (run.checkpoints / "step-00000010" / "model.safetensors").read_bytes()
    (run.checkpoints / "step-00000010" / "state.json").write_text("{")
    _, lines = _train(run, Quadratic())
    assert "step-00000010 is broken; continuing from step-00000005" in lines[0]
    assert [line["step"] for line in lines[1:]] == [8, 10]
    assert (run.checkpoints / "step-00000010" / "model.safetensors").read_bytes() == whole


def test_a_complete_run_does_nothing(run):
    _train(run, Quadratic())
    engine, lines = _train(run, Quadratic())
    assert engine.rates == [] and lines == []


def test_a_checkpoint_of_another_model_is_refused(run):
    _train(run, Quadratic())
    other = Quadratic()
    other.module = nn.Linear(4, 1)
    with pytest.raises(UserError, match=r"cannot resume .*'weight' has shape \(1, 3\), not \(1, 4\)"):
        _train(run, other)


def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_samples():
    task = Quadratic(bad_step=3)
    engine = PlainEngine(task.module)
    before = task.module.weight.detach().clone()
    batch = SimpleNamespace(step=3, keys=["a", "b"], wait_seconds=0.0)
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 4; first samples of this rank: a, b"):
        train_step(task, engine, batch, 0.1)
    assert torch.equal(task.module.weight, before) and task.moved == 0


def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_the_last_checkpoint(run, monkeypatch):
    real, calls = loop.write, []

    def write(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(loop, "write", write)
    with pytest.raises(UserError, match=r"checkpoint of step 10 .* cannot be written: No space left on device"):
        _train(run, Quadratic())
    assert [p.name for p in run.checkpoints.glob("step-*")] == ["step-00000005"]
    state = json.loads((run.checkpoints / "step-00000005" / "state.json").read_text())
    assert state["step"] == 5
