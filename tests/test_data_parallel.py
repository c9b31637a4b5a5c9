"""Two processes under torchrun train as one does with the same batches; shares of batches; what is refused."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput.data_parallel import Processes, joined, row_count, rows_of
from lilliput.errors import UserError
from lilliput.training import Callback, train

STEPS = 14
PROGRAM = """
import json, math, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
import test_data_parallel as tests
from lilliput.errors import UserError
from lilliput.training import Callback, _order, train

folder = Path(sys.argv[2])
torch.set_num_threads(1)
found = {}

class StopsOne(Callback):
    def on_step(self, state):
        state.stop = state.step == 5 and dist.get_rank() == 1

def run(name, batches, **options):
    model = tests.net(seed=100 + dist.get_rank() if dist.is_initialized() else 0)  # the first process's weights count
    history = train(model, batches, tests.cross_entropy, steps=tests.STEPS, lr=0.02, **options)
    values = [p.tolist() for p in model.parameters()]
    found[name] = {"losses": history.losses, "weights": values, "seconds": history.seconds}

run("whole", tests.pictures(), clip_norm=0.5)
run("parts", tests.pictures(), clip_norm=0.5, checkpoint=folder / "run", callbacks=[StopsOne()])
first = len(found["parts"]["losses"])
run("parts", tests.pictures(), clip_norm=0.5, checkpoint=folder / "run")
found["first_part"] = first
run("frozen", tests.pictures(), callbacks=[tests.Freeze()])
bad = tests.pictures()
bad[_order(0, 0, 5)[3]][0][-1] = math.nan  # in the last process's rows alone, of the fourth step's batch
for name, action in {
    "nan": lambda: run("nan", bad, checkpoint=folder / "bad", checkpoint_every_s=0),
    "differs": lambda: run("differs", tests.pictures(dist.get_rank() + 3)),
    "not rows": lambda: run("not rows", [1, 2, 3]),
}.items():
    try:
        action()
    except UserError as error:
        found[name] = str(error)
(folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
"""


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 8), nn.Tanh(), nn.Linear(8, 3))


def pictures(count=5):
    """Batches of 6, 5, 6, 6 and, the last, a single one, which leaves the first process without rows."""
    g = torch.Generator().manual_seed(1)
    sizes = ([6, 5, 6, 6, 1] * 2)[:count]
    return [[torch.randn(n, 1, 6, 6, generator=g), torch.randint(3, (n,), generator=g)] for n in sizes]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Freeze(Callback):
    """Holds the convolution still from the third step on."""

    def on_step(self, state):
        if state.step == 2:
            state.model[0].weight.requires_grad_(False)
            state.model[0].weight.grad = None


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("torchrun")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(program), tests, str(folder)],
        capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_have_the_loss_curve_of_one(two_processes):
    history = train(model := net(seed=0), pictures(), cross_entropy, steps=STEPS, lr=0.02, clip_norm=0.5)
    first, second = two_processes
    assert first["whole"] == second["whole"]
    assert first["whole"]["losses"] == pytest.approx(history.losses, rel=1e-4)
    for theirs, ours in zip(first["whole"]["weights"], model.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(theirs), ours.detach(), rtol=1e-3, atol=1e-5)


def test_one_that_stops_stops_all_and_the_run_goes_on_from_the_checkpoint(two_processes):
    model = net(seed=100)
    history = train(model, pictures(), cross_entropy, steps=STEPS, lr=0.02, clip_norm=0.5)
    for found in two_processes:
        assert found["first_part"] == 5
        assert found["parts"]["losses"] == pytest.approx(history.losses, rel=1e-4)


def test_layers_that_a_callback_freezes_stay_still(two_processes):
    model = net(seed=100)
    history = train(model, pictures(), cross_entropy, steps=STEPS, lr=0.02, callbacks=[Freeze()])
    for found in two_processes:
        assert found["frozen"]["losses"] == pytest.approx(history.losses, rel=1e-4)


def test_a_bad_value_in_one_share_is_told_by_all_and_the_checkpoint_stays(two_processes):
    first, second = two_processes
    assert "loss became nan at step 3" in first["nan"]
    assert "is kept" in first["nan"]
    assert second["nan"] == first["nan"]


def test_different_data_and_batches_that_have_no_rows_are_refused(two_processes):
    for found in two_processes:
        assert "have 3, 4 batches" in found["differs"]
        assert "cannot be shared out" in found["not rows"]


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(7, 2), (8, 3), (1, 2), (5, 5)])
def test_shares_cover_a_batch_once_and_differ_by_a_row_at_most(count, size):
    batch = {"input": torch.arange(count), "label": torch.arange(count) + 10, "name": "x", "scale": torch.tensor(2.0)}
    parts = [Processes(rank, size).rows(batch) for rank in range(size)]
    assert torch.equal(torch.cat([part["input"] for part, _ in parts]), batch["input"])
    assert torch.equal(torch.cat([part["label"] for part, _ in parts]), batch["label"])
    assert all(part["name"] == "x" and part["scale"] == 2 for part, _ in parts)
    assert sum(share for _, share in parts) == pytest.approx(1)
    lengths = [len(part["input"]) for part, _ in parts]
    assert max(lengths) - min(lengths) <= 1


def test_rows_of_tuples_and_named_tuples_keep_their_type():
    Pair = collections.namedtuple("Pair", "x y")
    found = rows_of(Pair(torch.arange(4), (torch.arange(4), 3)), slice(1, 3))
    assert type(found) is Pair
    assert found.x.tolist() == found.y[0].tolist() == [1, 2]
    assert found.y[1] == 3


@pytest.mark.parametrize("batch", [3, [], {"a": torch.zeros(2), "b": torch.zeros(3)}, torch.zeros(0, 2)])
def test_batches_without_one_number_of_rows_are_refused(batch):
    with pytest.raises(UserError, match="cannot be shared out"):
        row_count(batch)


def test_without_torchrun_a_process_is_alone():
    alone = joined()
    assert (alone.rank, alone.size, alone.first) == (0, 1, True)
    assert alone.rows([1, "any"]) == ([1, "any"], 1.0)
    with pytest.raises(UserError, match="torchrun"):
        joined(True)
