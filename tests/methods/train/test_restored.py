import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.train import _restored
from lilliput.methods.train._restored import restored


def wreck(model, end=None):
    """Change everything that can be changed, and then perhaps fail: by an exception, or by what a call does."""
    model.train(not model.training)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
        parameter.data.mul_(-2.5)
        parameter.data = parameter.data + 1
        parameter.grad = torch.ones_like(parameter)
    for module in list(model.modules()):
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                buffer.add_(1)
                module.register_buffer(name, buffer.clone())
        module.register_forward_hook(lambda *args: None)
        module.register_buffer("added", torch.zeros(3))
    first = next(name for name, _ in model.named_children())
    model.add_module(first, nn.Identity())
    model.something = "new"
    if end is not None:
        failure = end()
        if failure is not None:
            raise failure


class Stopped(Exception):
    pass


@pytest.fixture(params=["cnn", "llama"])
def model(request, tiny_cnn, tiny_llama):
    return tiny_cnn if request.param == "cnn" else tiny_llama


@pytest.mark.parametrize("end", [None, Stopped, KeyboardInterrupt, SystemExit])
def test_everything_comes_back_to_the_bit_however_the_block_ends(model, end, fingerprint):
    next(model.parameters()).grad = torch.full_like(next(model.parameters()), 3.0)
    list(model.parameters())[1].requires_grad_(False)
    before = fingerprint(model)
    if end is None:
        with restored(model) as inside:
            assert inside is model
            wreck(model)
            assert fingerprint(model) != before
    else:
        with pytest.raises(end), restored(model):
            wreck(model, end)
    assert fingerprint(model) == before


INTERRUPTED = """
    import signal, sys
    sys.path[:0] = {folders!r}
    import torch
    from test_restored import restored, wreck

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    before = {{name: value.clone() for name, value in model.state_dict().items()}}
    try:
        with restored(model):
            wreck(model, lambda: signal.raise_signal(signal.SIGINT))
    except KeyboardInterrupt:
        after = model.state_dict()
        print(list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before))
"""


def test_a_real_interrupt_in_the_middle_of_the_work(tmp_path):
    """In a process of its own: an interrupt that went astray would end the test run."""
    script = tmp_path / "interrupted.py"
    script.write_text(textwrap.dedent(INTERRUPTED.format(folders=[str(Path(__file__).parent)])))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("place", ["_Module", "_Tensor"])
@pytest.mark.parametrize("after", [0, 2])
def test_interrupts_while_it_restores_are_raised_afterwards(tiny_cnn, fingerprint, monkeypatch, place, after):
    before, kind = fingerprint(tiny_cnn), getattr(_restored, place)
    put_back_, calls = kind.put_back_, []

    def interrupted(self):
        calls.append(self)
        if len(calls) in (after + 1, after + 4):
            raise KeyboardInterrupt
        put_back_(self)

    monkeypatch.setattr(kind, "put_back_", interrupted)
    with pytest.raises(KeyboardInterrupt), restored(tiny_cnn):
        wreck(tiny_cnn)
    assert fingerprint(tiny_cnn) == before


def test_values_that_are_no_numbers_come_back_too(fingerprint):
    model = nn.Linear(4, 1, bias=False)
    bits = torch.tensor([[0x7FC00123, -1, 1, -(2**31)]], dtype=torch.int32)  # NaNs with payload, a denormal, -0.0
    model.weight.data.copy_(bits.view(torch.float32))
    before = fingerprint(model)
    with restored(model):
        model.weight.data.zero_()
    assert fingerprint(model) == before
    assert torch.equal(model.weight.detach().view(torch.int32), bits)


def test_named_parameters_alone_learn_and_are_copied(tiny_cnn, fingerprint):
    list(tiny_cnn.parameters())[-1].grad = torch.ones(10)
    before = fingerprint(tiny_cnn)
    with restored(tiny_cnn, ["fc.weight"]):
        assert [name for name, p in tiny_cnn.named_parameters() if p.requires_grad] == ["fc.weight"]
        assert all(p.grad is None for p in tiny_cnn.parameters())
        tiny_cnn.train()
        tiny_cnn(torch.randn(4, 1, 16, 16)).square().sum().backward()
        torch.optim.SGD(tiny_cnn.parameters(), lr=0.1).step()
        assert fingerprint(tiny_cnn)["tensors"] != before["tensors"]
    assert fingerprint(tiny_cnn) == before


def test_writing_to_what_is_not_named_is_refused(tiny_cnn):
    with pytest.raises(UserError, match=r"fc\.bias was changed"), restored(tiny_cnn, ["fc.weight"]), torch.no_grad():
        tiny_cnn.fc.bias.add_(1)


def test_unknown_names_are_refused_before_anything_happens(tiny_cnn, fingerprint):
    before = fingerprint(tiny_cnn)
    with pytest.raises(UserError, match=r"no\.such"), restored(tiny_cnn, ["no.such"]):
        pytest.fail("the block must not run")
    assert fingerprint(tiny_cnn) == before


def test_handles_from_before_still_remove_their_hooks(tiny_cnn):
    handle = tiny_cnn.register_forward_hook(lambda *args: None)
    with restored(tiny_cnn):
        handle.remove()
        assert not tiny_cnn._forward_hooks
    assert len(tiny_cnn._forward_hooks) == 1
    handle.remove()
    assert not tiny_cnn._forward_hooks


def test_blocks_inside_blocks(tiny_llama, fingerprint):
    before = fingerprint(tiny_llama)
    with restored(tiny_llama):
        wreck(tiny_llama)
        between = fingerprint(tiny_llama)
        with restored(tiny_llama):
            wreck(tiny_llama)
        assert fingerprint(tiny_llama) == between
    assert fingerprint(tiny_llama) == before


def test_the_model_can_be_trained_afterwards_as_if_nothing_had_been(tiny_llama):
    ids = torch.arange(3, 19).view(1, -1)
    losses = []
    for visited in (False, True):
        if visited:
            with restored(tiny_llama):
                wreck(tiny_llama)
        loss = tiny_llama(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append((loss.item(), tiny_llama.lm_head.weight.grad.clone()))
        tiny_llama.zero_grad()
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_the_random_state_is_not_touched(tiny_cnn):
    before = torch.get_rng_state()
    with restored(tiny_cnn):
        pass
    assert torch.equal(torch.get_rng_state(), before)
