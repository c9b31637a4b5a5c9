"""Messages over a stream socket: four bytes of length, then so many bytes. None waits without end or grows without end.

    n = send_frame(sock, b"...")            payload = receive_frame(sock)

A time limit is one of the whole frame: a peer that sends a byte now and then does not prolong it.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lilliput.errors import UserError

LENGTH = struct.Struct("!I")
LIMIT = 64 * 2**20  # bytes of a payload
TIMEOUT_S = 10.0


class FrameError(UserError):
    """A frame that did not arrive whole, in time and within its limit; the connection is of no use any more."""


def send_frame(sock: socket.socket, payload: bytes, limit: int = LIMIT, timeout_s: float = TIMEOUT_S) -> int:
    """Send one frame; the bytes that went out. Raises FrameError when it is too large or the peer does not take it."""
    if len(payload) > limit:
        raise FrameError(f"a frame of {len(payload)} bytes is above the limit of {limit}; send less or raise the limit")
    with _limited(sock), _explained("take", timeout_s):
        sock.settimeout(timeout_s)
        sock.sendall(LENGTH.pack(len(payload)) + payload)
    return LENGTH.size + len(payload)


def receive_frame(sock: socket.socket, limit: int = LIMIT, timeout_s: float = TIMEOUT_S) -> bytes | None:
    """The next payload; None when the peer closed the connection between two frames.

    Raises FrameError when the peer says nothing for `timeout_s`, closes within a frame, or announces more than `limit`.
    """
    end = time.monotonic() + timeout_s
    with _limited(sock), _explained("send", timeout_s):
        head = _exactly(sock, LENGTH.size, end, optional=True)
        if head is None:
            return None
        size = LENGTH.unpack(head)[0]
        if size > limit:
            raise FrameError(f"the peer announces a frame of {size} bytes, above the limit of {limit}; it is not read")
        return _exactly(sock, size, end)


def _exactly(sock: socket.socket, size: int, end: float, optional: bool = False) -> bytes | None:
    """`size` bytes before the clock shows `end`; None for none at all where that is allowed."""
    parts, missing = [], size
    while missing:
        left_s = end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        part = sock.recv(min(missing, 2**20))
        if not part and optional and missing == size:
            return None
        if not part:
            raise FrameError(f"the peer closed the connection after {size - missing} of {size} bytes; connect again")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


@contextmanager
def _limited(sock: socket.socket) -> Iterator[None]:
    """The socket's own time limit is back afterwards."""
    before = sock.gettimeout()
    try:
        yield
    finally:
        if sock.fileno() != -1:
            sock.settimeout(before)


@contextmanager
def _explained(verb: str, timeout_s: float) -> Iterator[None]:
    """Errors of the socket as FrameError."""
    try:
        yield
    except TimeoutError:
        raise FrameError(f"the peer did not {verb} a whole frame within {timeout_s:g} s; does it still run?") from None
    except OSError as error:
        raise FrameError(f"the connection broke: {error.strerror or error}; connect again") from None
