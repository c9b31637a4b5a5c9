"""The two parties of one session: the server garbles its network, the client evaluates it on its input.

    client -> server   HELLO                      server -> client   HELLO with the network's shape
    client -> server   READY, POINT               server -> client   POINTS                         base transfers
    client <- server   POINT                      client -> server   POINTS                         for whole inputs
    for each input, whose messages are as many for any depth:
    client -> server   ASK
    server -> client   COLUMNS                    client -> server   CORRECTIONS                    for whole inputs
    client -> server   COLUMNS                    server -> client   LABELS, TABLES ..., COLOURS

The labels of an input are fresh from the system's random source, and so is delta: a garbled circuit is used once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lilliput.errors import UserError
from lilliput.kernels.garbling import LABEL_BYTES, TABLE_BYTES, evaluate, garble
from lilliput.methods.circuits._binary_circuit import BinaryCircuit, SecretLayer, planes
from lilliput.methods.circuits._circuit import Circuit
from lilliput.methods.circuits._frames import Channel, Frame, SessionEnded
from lilliput.methods.circuits._oblivious import (
    BASE,
    ELEMENT_BYTES,
    BaseReceiver,
    BaseSender,
    ExtensionReceiver,
    ExtensionSender,
    column_bytes,
)
from lilliput.methods.circuits._shapes import LayerShape, Shape

MAGIC = b"lilliput secret inputs 1"  # the version of the protocol is its end
NONCE_BYTES, DIGEST_BYTES = 16, 32
MOST_SHAPE_BYTES = 2**16
CHUNK_ANDS = 2**14  # of a message with tables: half a megabyte
LABELS_FROM, PRODUCTS_FROM = 2**61, 2**62  # tweaks of the pads of transfers; garbling counts from 0


@dataclass
class Traffic:
    """What a session took so far, set-up and all answers together."""

    ands: int = 0  # of one answer
    answers: int = 0
    setup_seconds: float = 0.0
    setup_bytes: int = 0
    answer_seconds: float = 0.0
    answer_bytes: int = 0


class Network:
    """A network as the server keeps it: shape, secrets, and the circuit of the shape."""

    def __init__(self, shape: Shape, layers: list[SecretLayer]):
        self.shape, self.layers, self.compiled = shape, layers, BinaryCircuit(shape)
        self.text, self.digest = shape.to_json(), digest(self.compiled.circuit)


class Garbling:
    """One garbled circuit for one input: fresh labels, given away once."""

    def __init__(self, key: bytes, circuit: Circuit, bits: np.ndarray, tweak: int):
        self._key, self._circuit, self._bits, self._tweak, self._spent = key, circuit, bits, tweak, False
        self.delta = random_labels(1)[0]
        self.delta[0] |= 1
        self._labels = np.empty((circuit.gates.wires, LABEL_BYTES), np.uint8)
        self._labels[: circuit.gates.inputs] = random_labels(circuit.gates.inputs)

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The label of the wire that is false, and those of the evaluator's inputs for 0 and for 1, (inputs, 16)."""
        zeros = self._labels[1 : self._circuit.gates.inputs]
        return self._labels[0], zeros, zeros ^ self.delta

    def tables(self) -> Iterator[np.ndarray]:
        """The tables, chunk by chunk. Raises UserError at a second use."""
        if self._spent:
            raise UserError("a garbled circuit is used once; garble it anew for another input")
        self._spent = True
        for first, last in self._circuit.chunks(CHUNK_ANDS):
            yield garble(self._key, self._circuit.gates, first, last, self._bits, self.delta, self._labels, self._tweak)

    def colours(self) -> np.ndarray:
        """The colours of the outputs' labels for false, after all tables; every label is then overwritten."""
        found = self._labels[self._circuit.outputs, 0] & 1
        self._labels[:] = 0
        self.delta[:] = 0
        return found


def random_labels(count: int) -> np.ndarray:
    """Labels (count, 16) from the system's random source."""
    return np.frombuffer(secrets.token_bytes(count * LABEL_BYTES), np.uint8).reshape(count, LABEL_BYTES).copy()


def digest(circuit: Circuit) -> bytes:
    """What both parties must have built alike."""
    arrays = circuit.gates.kinds, circuit.gates.left, circuit.gates.right, circuit.outputs
    return hashlib.sha256(b"".join(hashlib.sha256(a.tobytes()).digest() for a in arrays)).digest()


def session_key(client_nonce: bytes, server_nonce: bytes, text: bytes) -> bytes:
    """The key of the cipher of a session; both know it, neither chose it."""
    return hashlib.sha256(MAGIC + client_nonce + server_nonce + text).digest()[:LABEL_BYTES]


class _Party:
    """What both count alike."""

    def __init__(self, channel: Channel):
        self.channel, self.traffic = channel, Traffic()
        self._tweak = 0
        self._mark = time.perf_counter(), 0

    def _note_setup(self, ands: int) -> None:
        seconds, size = self._since()
        self.traffic.ands, self.traffic.setup_seconds, self.traffic.setup_bytes = ands, seconds, size

    def _note_answer(self) -> None:
        seconds, size = self._since()
        self.traffic.answers += 1
        self.traffic.answer_seconds += seconds
        self.traffic.answer_bytes += size

    def _since(self) -> tuple[float, int]:
        """Seconds and bytes, in both directions, since `_begin`."""
        start, before = self._mark
        return time.perf_counter() - start, self._bytes() - before

    def _begin(self) -> None:
        self._mark = time.perf_counter(), self._bytes()

    def _bytes(self) -> int:
        return self.channel.sent_bytes + self.channel.received_bytes

    def _fresh_tweaks(self, ands: int) -> int:
        """The first of the next circuit's tweaks; no two circuits of a session share any."""
        self._tweak += 2 * ands
        return self._tweak - 2 * ands

    def _send_transfers(self, key: bytes, tweak: int) -> ExtensionSender:
        """Become the one with both pads, which is the receiver of the base transfers."""
        base = BaseReceiver(self.channel.receive(Frame.POINT, ELEMENT_BYTES))
        self.channel.send(Frame.POINTS, base.message)
        return ExtensionSender(key, base.choices, base.seeds, tweak)

    def _receive_transfers(self, key: bytes, tweak: int) -> ExtensionReceiver:
        base = BaseSender()
        self.channel.send(Frame.POINT, base.message)
        return ExtensionReceiver(key, base.seeds(self.channel.receive(Frame.POINTS, BASE * ELEMENT_BYTES)), tweak)


class ServerSession(_Party):
    """The garbler's side of one connection."""

    def __init__(self, channel: Channel, network: Network):
        super().__init__(channel)
        self._network = network

    def run(self) -> Traffic:
        """Answer until the client says goodbye. Raises SessionEnded, with the connection closed, for anything else."""
        try:
            self._set_up()
            while self._asked():
                self._answer()
        except BaseException:
            self.channel.close(Frame.ENDED)
            raise
        self.channel.close()
        return self.traffic

    def _set_up(self) -> None:
        self._begin()
        hello = self.channel.receive(Frame.HELLO, len(MAGIC) + NONCE_BYTES)
        if hello[: len(MAGIC)] != MAGIC:
            raise SessionEnded("the other party speaks another protocol or version")
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.channel.send(Frame.HELLO, nonce + self._network.text)
        self._key = session_key(bytes(hello[len(MAGIC) :]), nonce, self._network.text)
        if not hmac.compare_digest(self.channel.receive(Frame.READY, DIGEST_BYTES), self._network.digest):
            raise SessionEnded("the other party built another circuit; use the same version on both sides")
        self._labels_out = self._send_transfers(self._key, LABELS_FROM)
        if self._network.shape.bits:
            self._products_in = self._receive_transfers(self._key, PRODUCTS_FROM)
        self._note_setup(self._network.compiled.circuit.gates.ands)

    def _asked(self) -> bool:
        return self.channel.receive_any((Frame.ASK, Frame.BYE), 0)[0] == Frame.ASK

    def _answer(self) -> None:
        self._begin()
        compiled = self._network.compiled
        share = self._product_share() if self._network.shape.bits else None
        bits, circuit = compiled.garbler_bits(self._network.layers, share), compiled.circuit
        garbling = Garbling(self._key, circuit, bits, self._fresh_tweaks(circuit.gates.ands))
        columns = self.channel.receive(Frame.COLUMNS, column_bytes(circuit.inputs))
        pads = self._labels_out.pads(columns, circuit.inputs)
        public, zeros, ones = garbling.inputs()
        hidden = [labels ^ pad[:, 0] for labels, pad in zip((zeros, ones), pads)]
        self.channel.send(Frame.LABELS, public.tobytes() + hidden[0].tobytes() + hidden[1].tobytes())
        for tables in garbling.tables():
            self.channel.send(Frame.TABLES, tables.tobytes())
        self.channel.send(Frame.COLOURS, np.packbits(garbling.colours(), bitorder="little").tobytes())
        self._note_answer()

    def _product_share(self) -> np.ndarray:
        """Twice the sum of what the weights chose, less the threshold: (filters, places), modulo 2^share_bits."""
        shape, layer, secret = self._network.shape, self._network.shape.layers[0], self._network.layers[0]
        assert secret.thresholds is not None
        places = layer.picture[0] * layer.picture[1]
        choices = secret.weights.reshape(-1)
        columns, pads = self._products_in.choose(choices, places)
        self.channel.send(Frame.COLUMNS, columns)
        sizes = len(choices), places
        taken = self.channel.receive(Frame.CORRECTIONS, len(choices) * places * word_bytes(shape))
        chosen = words(pads) + choices[:, None] * unpacked(taken, sizes, shape)
        doubled = 2 * chosen.reshape(layer.filters, layer.taps, places).sum(1)
        return (doubled - secret.thresholds) % 2**shape.share_bits


class ClientSession(_Party):
    """The evaluator's side of one connection."""

    def __init__(self, channel: Channel):
        super().__init__(channel)
        try:
            self._set_up()
        except BaseException:
            self.channel.close(Frame.ENDED)
            raise

    def _set_up(self) -> None:
        self._begin()
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.channel.send(Frame.HELLO, MAGIC + nonce)
        reply = bytes(self.channel.receive(Frame.HELLO, at_most=NONCE_BYTES + MOST_SHAPE_BYTES))
        text = reply[NONCE_BYTES:]
        self.shape = Shape.from_json(text)
        self._compiled = BinaryCircuit(self.shape)
        self._key = session_key(nonce, reply[:NONCE_BYTES], text)
        self.channel.send(Frame.READY, digest(self._compiled.circuit))
        self._labels_in = self._receive_transfers(self._key, LABELS_FROM)
        if self.shape.bits:
            self._products_out = self._send_transfers(self._key, PRODUCTS_FROM)
        self._note_setup(self._compiled.circuit.gates.ands)

    def ask(self, values: np.ndarray) -> int:
        """The class of an input (values,): whole numbers, or bits. Raises SessionEnded, with the connection closed."""
        try:
            return self._ask(values)
        except BaseException:
            self.channel.close(Frame.ENDED)
            raise

    def _ask(self, values: np.ndarray) -> int:
        self._begin()
        self.channel.send(Frame.ASK)
        bits = planes(self._product_share(values), self.shape.share_bits) if self.shape.bits else values
        bits, circuit = bits.reshape(-1).astype(np.uint8), self._compiled.circuit
        columns, pads = self._labels_in.choose(bits)
        self.channel.send(Frame.COLUMNS, columns)
        labels = self._labels(bits, pads[:, 0])
        tweak = self._fresh_tweaks(circuit.gates.ands)
        before = circuit.gates.ands_before
        for first, last in circuit.chunks(CHUNK_ANDS):
            count = int(before[last] - before[first])
            tables = np.frombuffer(self.channel.receive(Frame.TABLES, count * TABLE_BYTES), np.uint8)
            evaluate(self._key, circuit.gates, first, last, labels, tweak, tables.reshape(count, TABLE_BYTES))
        outputs = len(circuit.outputs)
        colours = np.frombuffer(self.channel.receive(Frame.COLOURS, -(-outputs // 8)), np.uint8)
        answer = labels[circuit.outputs, 0] & 1 ^ np.unpackbits(colours, count=outputs, bitorder="little")
        self._note_answer()
        return int(self._compiled.answer(answer))

    def _labels(self, bits: np.ndarray, pads: np.ndarray) -> np.ndarray:
        """The label of every input, in room for those of all wires."""
        circuit = self._compiled.circuit
        message = self.channel.receive(Frame.LABELS, LABEL_BYTES * (1 + 2 * circuit.inputs))
        received = np.frombuffer(message, np.uint8).reshape(-1, LABEL_BYTES)
        zeros, ones = np.split(received[1:], 2)
        labels = np.empty((circuit.gates.wires, LABEL_BYTES), np.uint8)
        labels[0] = received[0]
        labels[1 : circuit.gates.inputs] = np.where(bits[:, None] == 1, ones, zeros) ^ pads
        return labels

    def _product_share(self, values: np.ndarray) -> np.ndarray:
        """Minus twice the sum of the random masks, less the sum of inputs: (filters, places), modulo 2^share_bits."""
        layer = self.shape.layers[0]
        inputs = under_taps(layer, values)
        count, places = layer.filters * layer.taps, inputs.shape[1]
        columns = self.channel.receive(Frame.COLUMNS, column_bytes(count))
        masks, others = (words(pads) for pads in self._products_out.pads(columns, count, places))
        corrections = masks + np.tile(inputs, (layer.filters, 1)) - others
        self.channel.send(Frame.CORRECTIONS, packed(corrections, self.shape))
        summed = masks.reshape(layer.filters, layer.taps, places).sum(1)
        return (-2 * summed - inputs.sum(0)) % 2**self.shape.share_bits


def under_taps(layer: LayerShape, values: np.ndarray) -> np.ndarray:
    """The inputs under each tap at each place, (taps, places), int64; 0 outside the picture."""
    places = layer.places()
    return np.where(places >= 0, values.reshape(-1).astype(np.int64)[places], 0).T


def words(pads: np.ndarray) -> np.ndarray:
    """The first four bytes of pads (transfers, places, 16) as numbers, int64."""
    return np.ascontiguousarray(pads[..., :4]).view("<u4")[..., 0].astype(np.int64)


def word_bytes(shape: Shape) -> int:
    """Bytes of a correction."""
    return -(-shape.share_bits // 8)


def packed(values: np.ndarray, shape: Shape) -> bytes:
    """Numbers modulo 2^share_bits in as few bytes."""
    reduced = (values % 2**shape.share_bits).astype("<u4")
    return np.ascontiguousarray(reduced[..., None].view(np.uint8)[..., : word_bytes(shape)]).tobytes()


def unpacked(data: bytes | bytearray, sizes: tuple[int, ...], shape: Shape) -> np.ndarray:
    """The inverse of `packed`, int64."""
    wide = np.zeros((*sizes, 4), np.uint8)
    wide[..., : word_bytes(shape)] = np.frombuffer(data, np.uint8).reshape(*sizes, -1)
    return wide.view("<u4")[..., 0].astype(np.int64)
