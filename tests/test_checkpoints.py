"""A training that is killed for real goes on to the same losses; one that breaks down leaves its checkpoint."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput.errors import UserError
from lilliput.training import Callback, _order, constant, train

PROGRAM = """
import json, sys, time
from pathlib import Path
import torch, torch.nn.functional as F
from torch import nn
from lilliput.training import Callback, train

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 3))
g = torch.Generator().manual_seed(1)
batches = [(torch.randn(8, 6, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(7)]

class Slow(Callback):
    def on_step(self, state):
        Path(sys.argv[2]).write_text(str(state.step))
        time.sleep(float(sys.argv[3]))

torch.manual_seed(5)
history = train(model, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]), steps=60, lr=0.01, seed=3, clip_norm=1.0,
                checkpoint=Path(sys.argv[1]), checkpoint_every_s=0, callbacks=[Slow()])
weights = [p.tolist() for p in model.state_dict().values()]
print(json.dumps({"losses": history.losses, "weights": weights}))
"""


def started(folder, name, pause_s):
    arguments = [
        sys.executable,
        "-c",
        PROGRAM,
        str(folder / f"{name}.ckpt"),
        str(folder / f"{name}.step"),
        str(pause_s),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )


def finished(process):
    text, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return json.loads(text)


def wait_for_step(folder, name, step, process):
    deadline, file = time.monotonic() + 200, folder / f"{name}.step"
    while not file.exists() or int(file.read_text() or 0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_9_in_the_midst_and_the_same_loss_curve(tmp_path):
    undisturbed = started(tmp_path, "whole", 0.0)
    killed = started(tmp_path, "killed", 0.05)
    wait_for_step(tmp_path, "killed", 11, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    died_at = int((tmp_path / "killed.step").read_text() or 0)
    resumed = finished(started(tmp_path, "killed", 0.0))
    assert died_at < 60
    assert len(resumed["losses"]) == 60
    assert resumed == finished(undisturbed)


# --- a run that breaks down ------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batches(bad=()):
    g = torch.Generator().manual_seed(1)
    found = [(torch.randn(5, 4, generator=g), torch.randint(2, (5,), generator=g)) for _ in range(6)]
    return [(x * math.nan, y) if i in bad else (x, y) for i, (x, y) in enumerate(found)]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Steps(Callback):
    def __init__(self):
        self.seen = []

    def on_start(self, state):
        self.seen.append(state.step)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_checkpoint(tmp_path):
    file, options = tmp_path / "run", {"steps": 12, "lr": 0.01, "checkpoint_every_s": 0}
    with pytest.raises(UserError, match=r"loss became nan at step 3 .*lower lr.* is kept"):
        train(net(), batches(bad=_order(0, 0, 6)[3:]), cross_entropy, checkpoint=file, **options)
    whole, mended, steps = net(), net(), Steps()
    expected = train(whole, batches(), cross_entropy, steps=12, lr=0.01)
    history = train(mended, batches(), cross_entropy, checkpoint=file, callbacks=[steps], **options)
    assert steps.seen == [3]
    assert history.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), mended.parameters()))


def test_without_a_checkpoint_none_is_promised(tmp_path):
    with pytest.raises(UserError, match="at step 0") as caught:
        train(net(), batches(bad=range(6)), cross_entropy, steps=3, checkpoint=tmp_path / "run")
    assert "is kept" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_follows_a_lowered_learning_rate(tmp_path):
    class Rates(Callback):
        def __init__(self, stop_at):
            self.found, self.stop_at = [], stop_at

        def on_step(self, state):
            self.found.append([group["lr"] for group in state.optimizer.param_groups])
            state.stop = state.step == self.stop_at

    def two_groups(parameters, lr):
        return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 10 * lr}], lr=lr)

    options = {"steps": 6, "optimizer": two_groups, "schedule": constant, "checkpoint": tmp_path / "run"}
    first, second = Rates(3), Rates(6)
    train(net(), batches(), cross_entropy, lr=0.04, callbacks=[first], **options)
    train(net(), batches(), cross_entropy, lr=0.01, callbacks=[second], **options)
    assert first.found == [pytest.approx([0.04, 0.4])] * 3
    assert second.found == [pytest.approx([0.01, 0.1])] * 3
