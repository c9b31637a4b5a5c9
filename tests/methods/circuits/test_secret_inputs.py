"""Two parties over sockets: the answers are those in the open, a wrong or silent party ends the session at once."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_binary_circuit import OFFSET, REAL, SCALE, SIGNS, made, whole

from lilliput.errors import UserError
from lilliput.method import Guard, find_method
from lilliput.methods.circuits import _oblivious, _parties
from lilliput.methods.circuits._binary_model import read
from lilliput.methods.circuits._frames import HEADER, Channel, Frame
from lilliput.methods.circuits._parties import ClientSession, Garbling, Network, ServerSession
from lilliput.methods.circuits.secret_inputs import SecretInputs, SessionEnded

GUARD = SecretInputs(bits=4, scale=SCALE, offset=OFFSET, timeout_s=20)
BRIEF_S = 0.4  # a timeout for those who must not wait
SOON_S = 5.0  # by when everything must have ended, on a busy machine
SMALL_PRIME = 2**192 - 63569  # (p - 1) / 2 is prime, too; only for tests


@pytest.fixture
def small_group(monkeypatch):
    """Base transfers in a group that protects nobody, a thousand times faster."""
    _oblivious._generator.cache_clear()
    monkeypatch.setattr(_oblivious, "prime", lambda: SMALL_PRIME)
    yield
    _oblivious._generator.cache_clear()


def network(name, first):
    model, size = made(name, first)
    return model, Network(*read(model, size, 4, SCALE, OFFSET)), size


class Background:
    """Something that runs beside the test; `result()` waits for it and gives what it returned or raised."""

    def __init__(self, call):
        self._found = []
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call):
        try:
            self._found.append(call())
        except Exception as error:
            self._found.append(error)

    def result(self):
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), "it hangs"
        return self._found[0]


def pair(timeout_s=20.0, ours=Channel, theirs=Channel):
    """Two connected channels."""
    a, b = socket.socketpair()
    return ours(a, timeout_s), theirs(b, timeout_s)


def inputs(first, size, count=50):
    return (
        whole(count, size) if first is REAL else torch.randn(count, *size, generator=torch.Generator().manual_seed(7))
    )


def expected(model, first, x):
    return model(x * SCALE + OFFSET if first is REAL else x).argmax(-1).tolist()


# --- answers -----------------------------------------------------------------------------------------------------


SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_binary_circuit import REAL, made
from test_secret_inputs import GUARD
model, size = made("convolutions", REAL)
with GUARD.server(model, size).listening() as address:
    print(address[1], flush=True)
    sys.stdin.read()
"""


def test_two_processes_give_the_answers_of_torch():
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline())
            model, size = made("convolutions", REAL)
            x = inputs(REAL, size)
            with GUARD.connect(("127.0.0.1", port)) as client:
                answers = [client.infer(one) for one in x]
        finally:
            server.stdin.close()
    assert server.returncode == 0
    assert answers == expected(model, REAL, x)
    assert len(set(answers)) > 1


@pytest.mark.parametrize("name", ["perceptron", "thresholds", "convolutions"])
@pytest.mark.parametrize("first", [SIGNS, REAL], ids=["signs", "whole"])
def test_answers_are_those_of_torch_and_of_the_open(small_group, name, first):
    model, size = made(name, first)
    server = GUARD.server(model, size)
    x = inputs(first, size, 20)
    with server.listening() as address, GUARD.connect(address) as client:
        answers = [client.infer(one.numpy()) for one in x]
    assert answers == expected(model, first, x) == server.plain(x).tolist()
    traffic = client.traffic
    assert (traffic.answers, traffic.ands) == (20, server.and_gates)
    assert traffic.answer_bytes > 20 * 32 * server.and_gates
    assert traffic.setup_bytes > (1 + (first is REAL)) * 128 * 384
    assert not server.failures


def test_both_sides_count_the_same_bytes(small_group):
    _, served, _ = network("perceptron", REAL)
    ours, theirs = pair()
    server = Background(ServerSession(theirs, served).run)
    client = ClientSession(ours)
    client.ask(np.zeros(12, np.int64))
    client.channel.close(Frame.BYE)
    traffic = server.result()
    assert (traffic.ands, traffic.answers) == (client.traffic.ands, client.traffic.answers) == (traffic.ands, 1)
    assert traffic.answer_bytes + HEADER.size == client.traffic.answer_bytes  # the question
    assert ours.sent_bytes + HEADER.size == theirs.received_bytes  # the goodbye
    assert ours.received_bytes == theirs.sent_bytes


def test_several_clients_at_once_and_no_more_than_allowed(small_group):
    model, size = made("perceptron", SIGNS)
    server = GUARD.with_(sessions=2).server(model, size)
    x = inputs(SIGNS, size, 4)
    with server.listening() as address, GUARD.connect(address) as one, GUARD.connect(address) as other:
        found = [(one.infer(v), other.infer(v)) for v in x]
        with pytest.raises(SessionEnded):
            GUARD.connect(address)
    assert found == [(v, v) for v in expected(model, SIGNS, x)]


# --- nothing is used twice, nothing is told ----------------------------------------------------------------------


class Recording(Channel):
    """Keeps what is sent."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kept = []

    def send(self, kind, payload=b""):
        self.kept.append((kind, bytes(payload)))
        super().send(kind, payload)


def test_the_same_input_twice_takes_two_circuits(small_group):
    _, served, _ = network("perceptron", REAL)
    ours, theirs = pair(ours=Recording, theirs=Recording)
    server = Background(ServerSession(theirs, served).run)
    client = ClientSession(ours)
    answers = {client.ask(np.arange(12)) for _ in range(3)}
    client.channel.close(Frame.BYE)
    server.result()
    assert len(answers) == 1
    for side in (ours, theirs):
        for kind in (Frame.TABLES, Frame.LABELS, Frame.COLUMNS, Frame.CORRECTIONS):
            said = [payload for k, payload in side.kept if k == kind]
            assert len(set(said)) == len(said)
    labels = [payload for k, payload in theirs.kept if k == Frame.LABELS]
    pieces = {text[i : i + 16] for text in labels for i in range(0, len(text), 16)}
    assert len(pieces) == sum(map(len, labels)) // 16
    assert len({len(p) for k, p in ours.kept if k == Frame.COLUMNS}) == 1  # whatever the input


def test_a_garbled_circuit_is_used_once():
    _, served, _ = network("perceptron", SIGNS)
    circuit = served.compiled.circuit
    garbling = Garbling(bytes(16), circuit, served.compiled.garbler_bits(served.layers), 0)
    first = np.concatenate(list(garbling.tables()))
    with pytest.raises(UserError, match="once"):
        list(garbling.tables())
    garbling.colours()
    assert not garbling.delta.any()
    again = Garbling(bytes(16), circuit, served.compiled.garbler_bits(served.layers), 0)
    assert again.delta[0] & 1
    assert not (np.concatenate(list(again.tables())) == first).all(-1).any()


def test_the_client_opens_one_label_of_each_input(small_group, monkeypatch):
    """Of the two labels that are sent under pads, the client's pad opens the one of its bit."""
    seen, made_labels = [], []
    real_labels, real_inputs = ClientSession._labels, Garbling.inputs
    monkeypatch.setattr(ClientSession, "_labels", lambda *a: seen.append((a[1], real_labels(*a))) or seen[-1][1])
    monkeypatch.setattr(
        Garbling, "inputs", lambda self: made_labels.append([x.copy() for x in real_inputs(self)]) or made_labels[-1]
    )
    _, served, _ = network("perceptron", SIGNS)
    ours, theirs = pair()
    Background(ServerSession(theirs, served).run)
    client = ClientSession(ours)
    monkeypatch.setattr(_parties, "evaluate", lambda *a: None)  # keeps the inputs' labels as they came
    client.ask(np.arange(12) % 3 == 0)
    client.channel.close(Frame.BYE)
    (bits, labels), (public, zeros, ones) = seen[0], made_labels[0]
    assert np.array_equal(labels[0], public)
    rows = np.arange(12)
    both = np.stack([zeros, ones])
    assert np.array_equal(labels[1:13], both[bits, rows])
    assert not (labels[1:13] == both[1 - bits, rows]).all(-1).any()


# --- those who do not keep to the protocol -----------------------------------------------------------------------


def tampering(victim, damage):
    """A channel that damages its messages of one kind."""

    class Tampering(Channel):
        def send(self, kind, payload=b""):
            if kind != victim:
                return super().send(kind, payload)
            payload = bytes(payload)
            if damage == "longer":
                return super().send(kind, payload + b"x")
            if damage == "shorter":
                return super().send(kind, payload[:-1])
            if damage == "another kind":
                return super().send(Frame.BYE if kind != Frame.ASK else Frame.TABLES, payload)
            if damage == "unknown kind":
                return self.connection.sendall(HEADER.pack(200, len(payload)) + payload)
            if damage == "huge":
                return self.connection.sendall(HEADER.pack(kind, 2**32 - 1) + payload)
            if damage == "cut":
                self.connection.sendall((HEADER.pack(kind, len(payload)) + payload)[: 2 + len(payload) // 2])
                self.close()
            return None  # silence

    return Tampering


FROM_CLIENT = (Frame.HELLO, Frame.READY, Frame.POINT, Frame.POINTS, Frame.ASK, Frame.CORRECTIONS, Frame.COLUMNS)
FROM_SERVER = (Frame.HELLO, Frame.POINTS, Frame.POINT, Frame.COLUMNS, Frame.LABELS, Frame.TABLES, Frame.COLOURS)
DAMAGES = ("longer", "shorter", "another kind", "unknown kind", "huge", "cut", "silence")


@pytest.fixture(scope="module")
def served():
    return network("perceptron", REAL)[1]


def session(served, ours=Channel, theirs=Channel):
    """What client and server say in the end, and how long it took them."""
    mine, other = pair(BRIEF_S, ours, theirs)
    start = time.monotonic()
    server = Background(ServerSession(other, served).run)

    def ask():
        client = ClientSession(mine)
        return client.ask(np.arange(12))

    client = Background(ask)
    return client.result(), server.result(), time.monotonic() - start


@pytest.mark.parametrize("kind", FROM_CLIENT, ids=lambda k: k.name)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_message_of_the_client_ends_the_session(small_group, served, kind, damage):
    if kind == Frame.ASK and damage == "shorter":
        pytest.skip("it is empty")
    client, server, seconds = session(served, ours=tampering(kind, damage))
    assert isinstance(server, SessionEnded)
    assert isinstance(client, SessionEnded)
    assert seconds < SOON_S


@pytest.mark.parametrize("kind", FROM_SERVER, ids=lambda k: k.name)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_message_of_the_server_ends_the_session(small_group, served, kind, damage):
    if kind == Frame.HELLO and damage == "longer":
        pytest.skip("its end is the shape, which must be read: see test_binary_circuit")
    client, server, seconds = session(served, theirs=tampering(kind, damage))
    assert isinstance(client, UserError)
    assert isinstance(server, SessionEnded)
    assert seconds < SOON_S


def hello():
    return HEADER.pack(Frame.HELLO, len(_parties.MAGIC) + 16) + _parties.MAGIC + bytes(16)


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(5), b"\xff" * 100, hello()[:-1], hello().replace(b"lilliput", b"brobding")],
    ids=["nothing", "http", "ended", "noise", "unfinished", "another protocol"],
)
def test_strangers_are_sent_away_without_a_word_about_the_network(served, said):
    stranger, connection = socket.socketpair()
    server = Background(ServerSession(Channel(connection, BRIEF_S), served).run)
    stranger.sendall(said)
    assert isinstance(server.result(), SessionEnded)
    stranger.settimeout(SOON_S)
    heard = b""
    try:
        while piece := stranger.recv(100):
            heard += piece
    except ConnectionResetError:
        pass
    assert heard in (b"", HEADER.pack(Frame.ENDED, 0))


def test_a_drip_of_bytes_does_not_stretch_the_time(served):
    stranger, connection = socket.socketpair()
    start = time.monotonic()
    server = Background(ServerSession(Channel(connection, BRIEF_S), served).run)
    try:
        for byte in hello():
            stranger.sendall(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        pass
    assert isinstance(server.result(), SessionEnded)
    assert time.monotonic() - start < SOON_S


def test_one_who_reads_nothing_does_not_hold_the_other(small_group):
    a, b = socket.socketpair()
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with pytest.raises(SessionEnded, match="took no TABLES"):
        Channel(a, BRIEF_S).send(Frame.TABLES, bytes(10**7))
    b.close()


def test_a_server_that_stops_sends_its_clients_away(small_group):
    model, size = made("perceptron", SIGNS)
    server = GUARD.server(model, size)
    with server.listening() as address:
        client = GUARD.connect(address)
    start = time.monotonic()
    with pytest.raises(SessionEnded):
        client.infer(torch.zeros(12))
    assert time.monotonic() - start < SOON_S
    with pytest.raises(SessionEnded, match="no server answers"):
        GUARD.connect(address)


# --- wrong calls ---------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused_before_anything_is_sent(small_group):
    model, size = made("perceptron", REAL)
    server = GUARD.server(model, size)
    with server.listening() as address, GUARD.connect(address) as client:
        before = client.traffic.answer_bytes
        for wrong, message in (
            (np.zeros(11, np.int64), "11 values"),
            (np.zeros(12), "whole numbers"),
            (np.full(12, 16), "0 to 15"),
            (np.full(12, -1), "0 to 15"),
        ):
            with pytest.raises(UserError, match=message):
                client.infer(wrong)
            with pytest.raises(UserError, match=message):
                server.plain([wrong])
        assert client.traffic.answer_bytes == before
        assert client.infer(whole(1, size)[0]) in range(5)


def test_settings_are_checked():
    for wrong in ({"bits": 0}, {"timeout_s": 0}, {"sessions": 0}, {"bits": 17}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            SecretInputs(**wrong)


def test_a_taken_port_is_said():
    model, size = made("perceptron", SIGNS)
    server = GUARD.server(model, size)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="choose another port"), server.listening(port=port):
            pass


def test_it_is_found_as_a_guard():
    assert find_method("circuits.secret_inputs") is SecretInputs
    assert issubclass(SecretInputs, Guard)
