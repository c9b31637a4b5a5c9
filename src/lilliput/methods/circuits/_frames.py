"""Messages between two parties: a kind, a length, and so many bytes, each within a time and a size known beforehand.

Whatever is not the message that is due ends the session: nothing is guessed, skipped or answered.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from enum import IntEnum

from lilliput.errors import UserError

HEADER = struct.Struct("<BI")
PIECE = 1 << 20  # bytes that are received at a time, so that a length alone claims no memory


class Frame(IntEnum):
    """Kinds of messages, in the order in which a session has them."""

    ENDED = 0  # the sender gives up; it does not say why
    HELLO = 1
    READY = 2
    POINT = 3  # a group element for base transfers
    POINTS = 4
    ASK = 5
    COLUMNS = 6  # of an extension of transfers
    CORRECTIONS = 7
    LABELS = 8  # both labels of each input, each under a pad
    TABLES = 9
    COLOURS = 10  # of the outputs' labels
    BYE = 11


class SessionEnded(UserError):
    """The other party is silent, gone, or said something else than what was due."""


class Channel:
    """A connected socket that counts its bytes. A message must be complete within `timeout_s`, in both directions."""

    def __init__(self, connection: socket.socket, timeout_s: float):
        self.connection, self.timeout_s = connection, timeout_s
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # parties take turns: nothing to wait for
        self.sent_bytes = self.received_bytes = 0

    def send(self, kind: Frame, payload: bytes = b"") -> None:
        """Send one message. Raises SessionEnded."""
        try:
            self.connection.settimeout(self.timeout_s)
            self.connection.sendall(HEADER.pack(kind, len(payload)) + payload)
        except TimeoutError:
            raise SessionEnded(f"the other party took no {kind.name} for {self.timeout_s:g} s") from None
        except OSError as error:
            raise SessionEnded(f"the other party is gone: {error}") from None
        self.sent_bytes += HEADER.size + len(payload)

    def receive(self, kind: Frame, size: int | None = None, at_most: int = 0) -> bytearray:
        """The next message, of this kind and of `size` bytes, or `at_most` so many. Raises SessionEnded."""
        return self.receive_any((kind,), size, at_most)[1]

    def receive_any(
        self, kinds: tuple[Frame, ...], size: int | None = None, at_most: int = 0
    ) -> tuple[Frame, bytearray]:
        """The same for one of several kinds."""
        deadline = time.monotonic() + self.timeout_s
        due = " or ".join(kind.name for kind in kinds)
        kind, length = HEADER.unpack(self._bytes(HEADER.size, deadline, due))
        if kind == Frame.ENDED:
            raise SessionEnded(f"the other party ended the session where {due} was due; see what it says on its side")
        if kind not in kinds:
            raise SessionEnded(f"the other party sent a message of kind {kind} where {due} was due")
        if length != size if size is not None else length > at_most:
            allowed = f"{size} bytes" if size is not None else f"at most {at_most} bytes"
            raise SessionEnded(f"the other party announced {length} bytes of {due}, which has {allowed}")
        return Frame(kind), self._bytes(length, deadline, due)

    def _bytes(self, count: int, deadline: float, due: str) -> bytearray:
        found = bytearray()
        while len(found) < count:
            left_s = deadline - time.monotonic()
            try:
                if left_s <= 0:
                    raise TimeoutError
                self.connection.settimeout(left_s)
                piece = self.connection.recv(min(PIECE, count - len(found)))
            except TimeoutError:
                raise SessionEnded(
                    f"the other party sent {len(found)} of {count} bytes of {due} in {self.timeout_s:g} s; "
                    "raise timeout_s if it is only slow"
                ) from None
            except OSError as error:
                raise SessionEnded(f"the other party is gone: {error}") from None
            if not piece:
                raise SessionEnded(
                    f"the other party closed the connection after {len(found)} of {count} bytes of {due}"
                )
            found += piece
        self.received_bytes += count
        return found

    def close(self, kind: Frame | None = None) -> None:
        """Close the connection, with a last word if it can be said at once."""
        if kind is not None:
            with contextlib.suppress(OSError):
                self.connection.settimeout(min(1.0, self.timeout_s))
                self.connection.sendall(HEADER.pack(kind, 0))
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)  # also wakes a thread that waits for a message
        self.connection.close()
