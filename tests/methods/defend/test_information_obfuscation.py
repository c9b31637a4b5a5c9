"""What is sent is what the server reads: against numpy, to the bit over a real socket, and bad peers end in errors."""

import socket
import struct
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.framing import FrameError, receive_frame
from lilliput.methods.defend._split import cuts, split
from lilliput.methods.defend._wire import Code, Remote, attend, pack, unpack
from lilliput.methods.defend.information_obfuscation import (
    FIXED,
    SAMPLE,
    InformationObfuscation,
    signal_basis,
    worth_sending,
)
from lilliput.workload import Workload
from lilliput.zoo import nets


class Net(nn.Module):
    """(B, 1, 8, 8) -> (B, 3), with a shortcut inside and constants in both halves."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(80, 10), nn.Linear(10, 3)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        x = torch.relu(self.stem(x) * self.gain)
        x = torch.relu(x + self.inner(x))
        x = torch.relu(self.down(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)) * self.gain)


@pytest.fixture
def work():
    torch.manual_seed(0)
    net = Net().eval()
    inputs = torch.randn(3, 8, 1, 8, 8)
    batches = [{"input": x, "label": torch.zeros(8, dtype=torch.long)} for x in inputs]
    return Workload.classifier(net, batches[:1], batches[1:2], batches[2:], name="split")


@pytest.fixture
def x(work):
    return work.test[0]["input"]


# --- the split ---------------------------------------------------------------------------------------------------


def test_a_model_is_cut_where_one_tensor_crosses(work):
    assert cuts(work.model) == ["stem", "down", "fc1", "fc2"]  # what `inner` reads also goes around it
    assert cuts(nets.resnet(width=4, depth=8)) == ["conv", "head"]


@pytest.mark.parametrize("layer", ["stem", "down", "fc1", "fc2"])
def test_the_halves_make_the_model(work, x, layer):
    device, first, rest = split(work.model, layer)
    assert torch.equal(rest(first(device(x))), work.model(x))
    assert first is work.model.get_submodule(layer)


def test_a_wrong_cut_is_refused_with_those_that_are_right(work, llama_work):
    for layer in ("inner", "nothing"):
        with pytest.raises(UserError, match=r"can be chosen: stem, down, fc1, fc2"):
            InformationObfuscation(layer=layer).wrap(work.model, work)
    with pytest.raises(UserError, match=r"cannot be traced by torch.fx|alone reads"):
        InformationObfuscation().wrap(llama_work.model, llama_work)


# --- what is kept ------------------------------------------------------------------------------------------------


def test_the_basis_is_that_of_numpy_without_what_is_mapped_to_zero():
    w = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) @ torch.randn(3, 9)
    basis = signal_basis(w)
    assert basis.read.shape == (3, 9)
    assert np.allclose(basis.power.sqrt(), np.linalg.svd(w.numpy(), compute_uv=False)[:3], rtol=1e-4)
    assert torch.allclose(basis.write @ basis.read, w, atol=1e-5)
    assert torch.allclose(basis.read @ basis.read.T, torch.eye(3), atol=1e-5)
    with pytest.raises(UserError, match="only zeros"):
        signal_basis(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("budget", "kept"), [(0.0, [1, 1, 1, 0]), (0.09, [1, 1, 1, 0]), (0.1, [0, 1, 1, 0]), (0.41, [0, 1, 0, 0])]
)
def test_the_smallest_go_until_the_budget_is_used_up(budget, kept):
    energy = torch.tensor([1.0, 6.0, 3.0, 0.0])
    assert worth_sending(energy, budget).tolist() == [bool(k) for k in kept]
    assert worth_sending(torch.stack([energy, energy.flip(0)]), budget)[1].tolist() == [bool(k) for k in kept[::-1]]


def test_something_is_always_sent():
    assert worth_sending(torch.zeros(4), 0.5).sum() == 1
    assert worth_sending(torch.tensor([1e-9, 1.0]), 0.999).tolist() == [False, True]


@pytest.mark.parametrize("layer", ["stem", "down", "fc1", "fc2"])
@pytest.mark.parametrize("mode", [FIXED, SAMPLE])
def test_without_a_budget_the_answer_stays(work, x, layer, mode):
    guarded = InformationObfuscation(layer=layer, budget=0.0, mode=mode).wrap(work.model, work)
    assert torch.allclose(guarded(x), work.model(x), atol=1e-4)
    first = split(work.model, layer).layer
    rank = min(first.weight.flatten(1).shape)
    assert guarded.encode(x).values.shape[:2] == (8, rank)


@pytest.mark.parametrize("mode", [FIXED, SAMPLE])
def test_the_output_of_the_first_layer_loses_no_more_than_the_budget(work, mode):
    x = work.calibration[0]["input"]
    device, first, _ = split(work.model, "fc1")
    guarded = InformationObfuscation(layer="fc1", budget=0.2, mode=mode).wrap(work.model, work)
    right = first(device(x)) - first.bias
    found = guarded.server.write(guarded.encode(x).values) - first.bias
    lost = (right - found).square().sum(1) / right.square().sum(1)
    code = guarded.encode(x)
    if mode == SAMPLE:
        assert (lost <= 0.2 + 1e-4).all()
        assert torch.equal(code.values != 0, code.mask)
        assert 8 <= code.mask.sum() < 80
    else:
        assert 0 < float((right - found).square().sum() / right.square().sum()) <= 0.2 + 1e-4
        assert code.mask is None
        assert code.values.shape[1] < 10


def test_the_numbers_left_out_are_the_least_useful_ones(work):
    """Any other set of as many coefficients loses more of the first layer's output."""
    x = work.calibration[0]["input"]
    device, first, _ = split(work.model, "fc1")
    kept = InformationObfuscation(layer="fc1", budget=0.2).wrap(work.model, work).encoder.read.weight
    basis = signal_basis(first.weight)
    losses = (basis.read @ device(x).T).square().mean(1) * basis.power
    ours = losses.sum() - ((kept @ device(x).T).square().mean(1) * (first.weight @ kept.T).square().sum(0)).sum()
    assert float(ours) == pytest.approx(float(losses.sort().values[: len(losses) - len(kept)].sum()), abs=1e-4)


@pytest.mark.parametrize(("bits", "error"), [(16, 1e-2), (8, 0.1)])
def test_fewer_bits_cost_little(work, x, bits, error):
    exact = InformationObfuscation(layer="down", budget=0.05).wrap(work.model, work)
    rounded = InformationObfuscation(layer="down", budget=0.05, bits=bits).wrap(work.model, work)
    assert rounded.encode(x).values.element_size() == bits // 8
    assert len(pack(rounded.encode(x))) < len(pack(exact.encode(x))) * bits / 32 + 32
    difference = (rounded(x) - exact(x)).abs().max() / exact(x).abs().max()
    assert 0 < difference < error


def test_a_last_layer_is_chosen_when_none_is_named(work, x):
    guarded = InformationObfuscation(budget=0.0).wrap(work.model, work)
    assert guarded.encode(x).values.shape == (8, 3)


def test_tokens_are_coded_one_by_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [{"input": torch.randn(2, 7, 4), "label": torch.zeros(2, dtype=torch.long)}]
    work = Workload.classifier(model, batches, batches, batches)
    guarded = InformationObfuscation(layer="2", budget=0.0).wrap(model, work)
    x = batches[0]["input"]
    assert guarded.encode(x).values.shape == (2, 5, 7)
    assert torch.allclose(guarded(x), model(x), atol=1e-5)


def test_features_that_are_not_finite_are_named(work):
    work.calibration[0]["input"][0] = float("nan")
    with pytest.raises(UserError, match="not finite on the calibration data"):
        InformationObfuscation(layer="fc1").wrap(work.model, work)


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("sizes", [(3, 5), (2, 9, 4, 4)])
def test_codes_survive_as_bytes(dtype, sizes):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, sizes, generator=generator).to(dtype)
    assert torch.equal(unpack(pack(Code(values))), values)
    mask = torch.rand(sizes[:2], generator=generator) < 0.4
    values = values * mask.view(*sizes[:2], *(1,) * (len(sizes) - 2)).to(dtype)
    payload = pack(Code(values, mask))
    found = unpack(payload)
    assert found.dtype is dtype
    assert torch.equal(found, values)
    whole = len(pack(Code(values)))
    saved = int((~mask).sum()) * values[0, 0].numel() * values.element_size()
    assert len(payload) == whole - saved + -(-mask.numel() // 8)


def test_bytes_that_are_no_code_are_refused():
    right = pack(Code(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)))
    for cut in range(len(right)):
        with pytest.raises(UserError):
            unpack(right[:cut])
    with pytest.raises(UserError, match="bytes, where"):
        unpack(right + b"\0")
    with pytest.raises(UserError, match="head is wrong"):
        unpack(b"\7" + right[1:])
    with pytest.raises(UserError, match="too large"):  # a mask without a bit set would stand for gigabytes of zeros
        unpack(struct.pack("<BB3IB", 0, 3, 8, 1, 2**30, 1) + b"\0")
    with pytest.raises(UserError, match="empty"):
        unpack(pack(Code(torch.ones(0, 3))))


# --- the socket --------------------------------------------------------------------------------------------------


@pytest.fixture
def attended(work):
    """`attended(guarded)`: address of a server half that runs in a thread here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def start(guarded, timeout_s=5.0):
            def run():
                while True:
                    try:
                        connection = listener.accept()[0]
                    except OSError:
                        return
                    threading.Thread(target=attend, args=(guarded.server, connection, timeout_s), daemon=True).start()

            threading.Thread(target=run, daemon=True).start()
            return listener.getsockname()

        yield start


def test_another_process_answers_to_the_bit(work, x):
    guarded = InformationObfuscation(layer="fc1", mode=SAMPLE, bits=16).wrap(work.model, work)
    with guarded.serving(timeout_s=60.0) as remote:
        with torch.no_grad():
            assert torch.equal(remote(x), guarded(x))
            assert torch.equal(remote(x[:3]), guarded(x[:3]))
        traffic = remote.traffic
    assert traffic.calls == 2
    assert traffic.sent_bytes == sum(4 + len(pack(guarded.encode(part))) for part in (x, x[:3]))
    assert traffic.received_bytes == sum(4 + 1 + 2 + 8 + 1 + 4 * 3 * n for n in (8, 3))
    assert traffic.device_ms > 0
    assert traffic.waited_ms > 0
    with pytest.raises(FrameError, match="no server answers"):
        remote(x)


def test_a_server_that_does_not_fit_refuses_and_goes_on(work, x, attended):
    guarded = InformationObfuscation(layer="fc1", budget=0.0).wrap(work.model, work)
    other = InformationObfuscation(layer="fc2", budget=0.0).wrap(work.model, work)
    address = attended(guarded)
    wrong, right = (Remote(g.device, g.encoder, address) for g in (other, guarded))
    with pytest.raises(UserError, match="refused: a code of the type"):
        wrong(x)
    assert torch.equal(right(x), guarded(x))
    right.close()
    assert torch.equal(right(x), guarded(x))


@pytest.mark.parametrize("said", [b"", b"\0\0\0\5abc", struct.pack("!I", 2**31)])
def test_a_device_that_stops_cuts_off_or_boasts_loses_its_connection_alone(work, x, attended, said):
    guarded = InformationObfuscation(layer="fc1", budget=0.0).wrap(work.model, work)
    address = attended(guarded, timeout_s=0.3)
    with socket.create_connection(address) as bad:
        bad.sendall(said or b"\0")
        assert receive_frame(bad, timeout_s=5.0) is None
        assert torch.equal(Remote(guarded.device, guarded.encoder, address)(x), guarded(x))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "within 0.3 s"),
        (b"", "closed the connection without"),
        (b"\0\0\1\0abc", "closed the connection after 3"),
        (struct.pack("!I", 2**31), "announces"),
        (b"\0\0\0\3\0ab", "head is wrong"),
    ],
)
def test_a_server_that_stops_cuts_off_or_boasts_is_named(work, x, answer, message):
    guarded = InformationObfuscation(layer="fc1").wrap(work.model, work)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with listener.accept()[0] as connection:
                receive_frame(connection)
                if answer is not None:
                    connection.sendall(answer)
                    return
                done.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UserError, match=message):
            Remote(guarded.device, guarded.encoder, listener.getsockname(), timeout_s=0.3)(x)
        done.set()
        thread.join()
