"""A split model over a socket: codes as bytes, the server half in a process of its own, the device half that asks it.

A code (B, r, ...) is: type, number of sizes, the sizes, whether there is a mask, the mask's bits, the kept numbers; all
little-endian. An answer is one byte, 0 before a tensor or 1 before the reason of a refusal.
"""

from __future__ import annotations

import copy
import math
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from lilliput._probe import torch_threads
from lilliput.errors import UserError
from lilliput.framing import LIMIT, TIMEOUT_S, FrameError, receive_frame, send_frame

TYPES = {torch.float32: "<f4", torch.float16: "<f2", torch.int8: "i1"}
ANSWER, REFUSAL = b"\0", b"\1"
IDLE_S = 600.0  # a device may be silent for so long between two requests
START_S = 120.0  # a new process needs this long at most
Address = tuple[str, int]


class Code(NamedTuple):
    """Numbers (B, r, ...) that leave the device; where `mask` (B, r) is false they are 0 and are not sent."""

    values: Tensor
    mask: Tensor | None = None


def pack(code: Code) -> bytes:
    """A code as bytes."""
    values, mask = code.values.detach(), code.mask
    sizes = tuple(values.shape)
    head = struct.pack(f"<BB{len(sizes)}IB", list(TYPES).index(values.dtype), len(sizes), *sizes, mask is not None)
    bits = b"" if mask is None else np.packbits(mask.numpy()).tobytes()
    sent = values if mask is None else values[mask]
    return head + bits + sent.contiguous().numpy().astype(TYPES[values.dtype], copy=False).tobytes()


def unpack(payload: bytes) -> Tensor:
    """The numbers of a code, with zeros where none were sent. Raises UserError for bytes that are no code."""
    try:
        kind, dims = struct.unpack_from("<BB", payload)
        *sizes, masked = struct.unpack_from(f"<{dims}IB", payload, 2)
        dtype = list(TYPES)[kind]
    except (struct.error, IndexError):
        raise UserError(f"{len(payload)} bytes are no code: its head is wrong") from None
    numbers, count, start = np.dtype(TYPES[dtype]), math.prod(sizes), 2 + 4 * dims + 1
    if not 0 < count * numbers.itemsize <= LIMIT or (masked and dims < 2):
        raise UserError(f"a code of the sizes {sizes} is empty, too large, or has a mask for samples without numbers")
    if not masked:
        return _numbers(payload, start, dtype, count).view(sizes)
    bits = payload[start : start + math.ceil(sizes[0] * sizes[1] / 8)]
    if 8 * len(bits) < sizes[0] * sizes[1]:
        raise UserError(f"a code of the sizes {sizes} ends within its mask")
    flags = np.unpackbits(np.frombuffer(bits, np.uint8), count=sizes[0] * sizes[1])
    mask = torch.from_numpy(flags.astype(bool)).view(sizes[0], sizes[1])
    rows = int(mask.sum())
    values = torch.zeros(sizes, dtype=dtype)
    values[mask] = _numbers(payload, start + len(bits), dtype, rows * math.prod(sizes[2:])).view(rows, *sizes[2:])
    return values


def _numbers(payload: bytes, start: int, dtype: torch.dtype, count: int) -> Tensor:
    """The rest of a payload as `count` numbers; neither fewer nor more."""
    numbers = np.dtype(TYPES[dtype])
    if len(payload) - start != count * numbers.itemsize:
        raise UserError(f"a code ends with {len(payload) - start} bytes, where {count} times {numbers.itemsize} belong")
    return torch.from_numpy(np.array(np.ndarray(count, numbers, payload, start), numbers.newbyteorder("=")))


# --- the server ------------------------------------------------------------------------------------------------


@contextmanager
def serving(half: nn.Module, timeout_s: float = TIMEOUT_S, idle_s: float = IDLE_S) -> Iterator[Address]:
    """The server half in another process, at the address (loopback, free port) that this gives; ended afterwards.

    Scripts that use it need `if __name__ == "__main__":`, as for every process that Python spawns.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    limits = torch.get_num_threads(), timeout_s, idle_s
    process: Any = spawn.Process(target=_run, args=(copy.deepcopy(half), theirs, *limits), daemon=True)
    process.start()
    theirs.close()
    try:
        yield "127.0.0.1", _port(ours)
    finally:
        ours.close()
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _port(pipe: Any) -> int:
    try:
        if pipe.poll(START_S):
            return pipe.recv()
    except EOFError:
        raise UserError("the process of the server ended before it listened; its own message says why") from None
    raise UserError(f"the process of the server did not start within {START_S:g} s")


def _run(half: nn.Module, pipe: Any, threads: int, timeout_s: float, idle_s: float) -> None:
    """What the process does: tell the port, and give every connection a thread."""
    with torch_threads(threads), socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=attend, args=(half.eval(), connection, timeout_s, idle_s), daemon=True).start()


def attend(half: nn.Module, connection: socket.socket, timeout_s: float = TIMEOUT_S, idle_s: float = IDLE_S) -> None:
    """Answer a device until it leaves, is silent for `idle_s`, or sends a frame that is cut off, late or too large."""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while select.select([connection], [], [], idle_s)[0]:
                payload = receive_frame(connection, timeout_s=timeout_s)
                if payload is None:
                    return
                send_frame(connection, _answer(half, payload), timeout_s=timeout_s)
        except FrameError:
            return  # the device sees a closed connection and says so


@torch.inference_mode()
def _answer(half: nn.Module, payload: bytes) -> bytes:
    try:
        return ANSWER + pack(Code(half(unpack(payload)).float()))
    except (UserError, RuntimeError) as error:  # torch says with a RuntimeError that shapes do not fit
        return REFUSAL + str(error).encode()[:500]


# --- the device ------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What a device sent and waited for; the heads of the frames are counted."""

    calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    device_ms: float = 0.0
    waited_ms: float = 0.0  # for the server: the way there, its work, the way back


class Remote(nn.Module):
    """The device half; a call sends codes to the server half and gives its answer. Counts in `traffic`."""

    def __init__(self, device: nn.Module, encoder: nn.Module, address: Address, timeout_s: float = TIMEOUT_S):
        super().__init__()
        self.device, self.encoder = device, encoder
        self.address, self.timeout_s, self.traffic = address, timeout_s, Traffic()
        self._socket: socket.socket | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        start = time.perf_counter()
        payload = pack(self.encoder(self.device(*args, **kwargs)))
        sent = time.perf_counter()
        answer = self._asked(payload)
        self.traffic.calls += 1
        self.traffic.device_ms += 1e3 * (sent - start)
        self.traffic.waited_ms += 1e3 * (time.perf_counter() - sent)
        if answer[:1] != ANSWER:
            raise UserError(f"the server at {self.address} refused: {answer[1:].decode(errors='replace')}")
        return unpack(answer[1:])

    def close(self) -> None:
        """End the connection; the next call makes a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _asked(self, payload: bytes) -> bytes:
        """The answer to one request. After a failure the connection is closed, since it may be out of step."""
        try:
            if self._socket is None:
                self._socket = _connected(self.address, self.timeout_s)
            self.traffic.sent_bytes += send_frame(self._socket, payload, timeout_s=self.timeout_s)
            answer = receive_frame(self._socket, timeout_s=self.timeout_s)
            if not answer:
                raise FrameError(f"the server at {self.address} closed the connection without an answer")
        except FrameError:
            self.close()
            raise
        self.traffic.received_bytes += 4 + len(answer)
        return answer


def _connected(address: Address, timeout_s: float) -> socket.socket:
    try:
        connection = socket.create_connection(address, timeout_s)
    except OSError as error:
        raise FrameError(f"no server answers at {address}: {error.strerror or error}; is it running?") from None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
