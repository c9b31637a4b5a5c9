"""Answers on inputs that the server does not see, with weights that the client does not see, by garbled circuits.

Two processes, or two machines, that keep to the protocol and may be curious ("semi-honest"). The server garbles a
binary network; the client evaluates it on its input and alone learns the class. In a garbled circuit XNOR with a weight
costs nothing and counting n agreements n ANDs less a few, so that networks of signs are what one can afford. What is
protected, against whom, and what is not: docs/secret_inputs.md.

    guard = SecretInputs(bits=8, scale=1 / 255)
    with guard.server(model, (1, 28, 28)).listening() as address:     # the server's process
        ...
    with guard.connect(address) as client:                            # the client's process
        answer = client.infer(pixels)                                 # whole numbers, 0 .. 255

The model is an `nn.Sequential` of binary layers (`quantize.binary`) with BatchNorm and max-pooling between them. A
first layer with real inputs takes whole numbers p for scale * p + offset; one with signs takes the signs of what
`infer` gets.

Paper: Riazi et al., "XONN: XNOR-based Oblivious Deep Neural Network Inference", 2019 (arXiv 1902.07342).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import OUTPUT_SHAPE, Facts, Guard, knob
from lilliput.methods.circuits._binary_circuit import plain
from lilliput.methods.circuits._binary_model import read
from lilliput.methods.circuits._frames import Channel, Frame, SessionEnded
from lilliput.methods.circuits._parties import ClientSession, Network, ServerSession, Traffic

if TYPE_CHECKING:
    from lilliput.workload import Workload

__all__ = ["Client", "SecretInputs", "Server", "SessionEnded", "Traffic"]
Address = tuple[str, int]
POLL_S = 0.2  # how soon a server notices that it is to stop


@dataclass(frozen=True)
class SecretInputs(Guard):
    """Answer by a garbled circuit: the server learns no input, the client no weight."""

    paper: ClassVar = "xonn"
    bits: int = knob(8, low=1, high=16, help="of the whole numbers that a first layer with real inputs takes")
    scale: float = knob(1.0, help="of those numbers: the network sees scale * p + offset")
    offset: float = knob(0.0, help="of those numbers")
    timeout_s: float = knob(30.0, low=0.1, high=3600, help="for one message of the other party, or between inputs")
    sessions: int = knob(4, low=1, high=64, help="clients that are served at the same time")
    facts: ClassVar = Facts(stage="serve", keeps={OUTPUT_SHAPE}, effect="the server sees no input; slower by far")

    def wrap(self, model: nn.Module, workload: Workload) -> Server:
        """A server for inputs like the workload's. Raises UserError for a model that is not a chain of such layers."""
        return self.server(model, tuple(workload.example["input"].shape[1:]))

    def server(self, model: nn.Module, size: tuple[int, ...]) -> Server:
        """A server for inputs of a size, (values,) or (channels, height, width). Raises UserError."""
        return Server(Network(*read(model, size, self.bits, self.scale, self.offset)), self)

    def connect(self, address: Address | socket.socket) -> Client:
        """A client of a server at (host, port), or behind a connected socket. Raises SessionEnded, a UserError."""
        if not isinstance(address, socket.socket):
            try:
                address = socket.create_connection(address, self.timeout_s)
            except OSError as error:
                raise SessionEnded(f"no server answers at {address}: {error}") from None
        return Client(ClientSession(Channel(address, self.timeout_s)))


class Server:
    """Keeps a network and answers those who connect; each session runs in its own thread."""

    def __init__(self, network: Network, how: SecretInputs):
        self.network, self.how = network, how
        self.failures: list[str] = []  # why sessions ended before their time

    @property
    def and_gates(self) -> int:
        """What one answer costs: each takes 32 bytes and some AES blocks, all other gates nothing to send."""
        return self.network.compiled.circuit.gates.ands

    def plain(self, inputs: Any) -> np.ndarray:
        """The classes (B,) of inputs (B, ...) computed in the open, with the same whole thresholds."""
        rows = [_values(x, self.network.shape) for x in inputs]
        return plain(self.network.shape, self.network.layers, np.stack(rows))

    def serve(self, connection: socket.socket) -> Traffic:
        """One session over a connected socket, until the client leaves. Raises SessionEnded, a UserError."""
        return ServerSession(Channel(connection, self.how.timeout_s), self.network).run()

    @contextmanager
    def listening(self, host: str = "127.0.0.1", port: int = 0) -> Iterator[Address]:
        """Serve in the background; gives the address. On leaving, no new session begins and open ones are cut."""
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            raise UserError(f"cannot listen at {host}:{port}: {error}; choose another port") from None
        listener.settimeout(POLL_S)
        stop, opened = threading.Event(), set()
        accepting = threading.Thread(target=self._accept, args=(listener, stop, opened), daemon=True)
        accepting.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            stop.set()
            accepting.join()
            listener.close()
            for connection in list(opened):
                Channel(connection, POLL_S).close()

    def _accept(self, listener: socket.socket, stop: threading.Event, opened: set[socket.socket]) -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:  # nobody came, or nobody can come any more
                continue
            if len(opened) >= self.how.sessions:
                Channel(connection, POLL_S).close(Frame.ENDED)
                continue
            opened.add(connection)
            threading.Thread(target=self._session, args=(connection, opened), daemon=True).start()

    def _session(self, connection: socket.socket, opened: set[socket.socket]) -> None:
        try:
            self.serve(connection)
        except SessionEnded as error:
            self.failures.append(str(error))
        finally:
            opened.discard(connection)


class Client:
    """Asks a server; the server learns when and how often, but neither input nor answer."""

    def __init__(self, session: ClientSession):
        self._session = session

    @property
    def traffic(self) -> Traffic:
        """ANDs of an answer; seconds and bytes of set-up and answers, in both directions."""
        return self._session.traffic

    def infer(self, x: Tensor | np.ndarray) -> int:
        """The class of one input of the server's size. Raises UserError; after a SessionEnded, connect anew."""
        return self._session.ask(_values(x, self._session.shape))

    def close(self) -> None:
        """Leave the session."""
        self._session.channel.close(Frame.BYE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _values(x: Any, shape: Any) -> np.ndarray:
    """An input as whole numbers in their range, or as bits, (values,). Raises UserError before anything is sent."""
    array = np.asarray(x).reshape(-1)
    if array.size != shape.inputs:
        raise UserError(f"the input has {array.size} values; the server's network takes {shape.inputs}")
    if not shape.bits:
        return array if array.dtype == bool else array >= 0
    if array.dtype.kind not in "iu":
        raise UserError(f"the input is {array.dtype}; the server's network takes whole numbers of {shape.bits} bits")
    if array.size and not (array.min() >= 0 and array.max() < 2**shape.bits):
        raise UserError(f"the input goes from {array.min()} to {array.max()}; give 0 to {2**shape.bits - 1}")
    return array
