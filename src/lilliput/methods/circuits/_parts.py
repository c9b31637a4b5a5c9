"""Parts of circuits, in Amaranth: streams, nested counters, tables, and sums as trees."""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Array, Const, Mux, Signal, signed, unsigned
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out

from lilliput.methods.circuits._words import Circuit, Value, signed_bits


def flow(i_width: int, o_width: int) -> wiring.Signature:
    """The two streams of a stage: words in at `i`, words out at `o`, each with valid and ready."""
    return wiring.Signature(
        {"i": In(stream.Signature(unsigned(i_width))), "o": Out(stream.Signature(unsigned(o_width)))}
    )


def counters(m: Circuit, sizes: Sequence[int], step: Value) -> tuple[list[Value], list[Value]]:
    """Counters within one another, the innermost first, that move on with `step`.

    Returns their values, and for each whether it and all inside it stand at their last value.
    """
    values: list[Value] = []
    ends: list[Value] = []
    inside: Value = Const(1, 1)
    for size in sizes:
        value: Value = Const(0, 0)
        if size > 1:
            value = Signal(range(size))
            end = value == size - 1
            with m.If(step & inside):
                m.d.sync += value.eq(Mux(end, 0, value + 1))
            inside = inside & end
        values.append(value)
        ends.append(inside)
    return values, ends


def later(m: Circuit, step: Value, values: dict[str, Value]) -> dict[str, Value]:
    """The values as they were one step before."""
    found: dict[str, Value] = {}
    for name, value in values.items():
        found[name] = value
        if not isinstance(value, Const):
            found[name] = held = Signal(value.shape(), name=f"{name}_later")
            with m.If(step):
                m.d.sync += held.eq(value)
    return found


def rom(m: Circuit, name: str, words: Sequence[int], width: int, address: Value, step: Value) -> Value:
    """The word at `address` one `step` later; a single word is a constant."""
    if len(words) == 1:
        return Const(words[0], width)
    table = memory.Memory(shape=unsigned(width), depth=len(words), init=list(words))
    m.submodules[name] = table
    port = table.read_port()
    m.d.comb += [port.addr.eq(address), port.en.eq(step)]
    return port.data


def slices(word: Value, width: int) -> list[Value]:
    """The numbers of a word, the first one in the lowest bits."""
    return [word[i : i + width] for i in range(0, len(word), width)]


def lookup(index: Value, table: Sequence[int]) -> Value:
    """The entry of a small constant table."""
    if list(table) == list(range(len(table))):
        return index
    bits = max(signed_bits(entry) for entry in table)
    shape = signed(bits) if min(table) < 0 else unsigned(max(1, bits - 1))
    return Array([Const(entry, shape) for entry in table])[index]


def tree(terms: Sequence[Value]) -> Value:
    """The sum, added in pairs."""
    terms = list(terms)
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2])]
        terms = pairs + ([terms[-1]] if len(terms) % 2 else [])
    return terms[0]


def times(x: Value, factor: int) -> Value:
    """x times a positive constant, by shifts and additions alone."""
    shifted = [x.shift_left(bit) for bit in range(factor.bit_length()) if factor >> bit & 1]
    return tree(shifted) if shifted else Const(0, 1)
