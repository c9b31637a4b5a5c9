"""Frames arrive whole or not at all: against bytes written by hand, peers that stop, cut off, drip or boast."""

import socket
import struct
import threading
import time

import pytest

from lilliput.framing import FrameError, receive_frame, send_frame


@pytest.fixture
def pair():
    a, b = socket.socketpair()
    yield a, b
    a.close()
    b.close()


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)) * 20])
def test_what_is_sent_is_a_length_and_the_bytes(pair, payload):
    a, b = pair
    assert send_frame(a, payload) == 4 + len(payload)
    assert b.recv(1 << 16) == struct.pack("!I", len(payload)) + payload
    b.sendall(struct.pack("!I", len(payload)) + payload)
    assert receive_frame(a) == payload


def test_frames_keep_their_borders_however_the_bytes_come(pair):
    a, b = pair
    stream = b"".join(struct.pack("!I", len(p)) + p for p in (b"one", b"", b"three"))
    for i in range(len(stream)):
        a.sendall(stream[i : i + 1])
    assert [receive_frame(b) for _ in range(3)] == [b"one", b"", b"three"]


def test_a_large_frame_passes_both_ways_at_once(pair):
    a, b = pair
    payload = bytes(3 * 2**20)
    sender = threading.Thread(target=send_frame, args=(a, payload))
    sender.start()
    assert receive_frame(b) == payload
    sender.join()


def test_the_end_between_two_frames_is_no_error(pair):
    a, b = pair
    send_frame(a, b"last")
    a.close()
    assert receive_frame(b) == b"last"
    assert receive_frame(b) is None


@pytest.mark.parametrize("sent", [b"\0", struct.pack("!I", 10), struct.pack("!I", 10) + b"nine byte"])
def test_a_frame_that_is_cut_off_is_named(pair, sent):
    a, b = pair
    a.sendall(sent)
    a.close()
    with pytest.raises(FrameError, match="closed the connection after"):
        receive_frame(b)


@pytest.mark.parametrize("sent", [b"", b"\0\0", struct.pack("!I", 10) + b"half"])
def test_a_peer_that_stops_talking_is_not_waited_for(pair, sent):
    a, b = pair
    a.sendall(sent)
    start = time.monotonic()
    with pytest.raises(FrameError, match=r"within 0\.2 s"):
        receive_frame(b, timeout_s=0.2)
    assert time.monotonic() - start < 5


def test_dripping_bytes_do_not_prolong_the_limit(pair):
    a, b = pair
    stop = threading.Event()

    def drip():
        a.sendall(struct.pack("!I", 1000))
        while not stop.wait(0.05):
            a.sendall(b".")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(FrameError, match=r"within 0\.4 s"):
            receive_frame(b, timeout_s=0.4)
    finally:
        stop.set()
        thread.join()


def test_a_frame_above_the_limit_is_neither_sent_nor_read(pair):
    a, b = pair
    with pytest.raises(FrameError, match="11 bytes is above the limit of 10"):
        send_frame(a, bytes(11), limit=10)
    a.sendall(struct.pack("!I", 2**32 - 1))
    with pytest.raises(FrameError, match="announces a frame of 4294967295 bytes"):
        receive_frame(b, limit=10)
    send_frame(a, bytes(10), limit=10)
    assert receive_frame(b, limit=10) == bytes(10)


def test_a_peer_that_does_not_read_is_not_waited_for(pair):
    with pytest.raises(FrameError, match="did not take a whole frame"):
        send_frame(pair[0], bytes(32 * 2**20), timeout_s=0.2)


def test_a_broken_connection_is_named(pair):
    a, b = pair
    b.close()
    with pytest.raises(FrameError, match="broke"):
        send_frame(a, b"x")


def test_the_sockets_own_limit_is_back_afterwards(pair):
    a, b = pair
    a.settimeout(7.0)
    send_frame(a, b"x")
    send_frame(b, b"y")
    assert receive_frame(a) == b"y"
    assert a.gettimeout() == 7.0
    a.close()
    with pytest.raises(FrameError, match="broke"):
        receive_frame(a)
