"""The circuit of a product: `lanes` inputs times `units` channels a cycle, with one frame kept while another arrives.

Words of `lanes` codes fill one half of a memory while the other half is read, word by word, for each window and each
group of `units` channels. A cycle gives the partial sums of a word; after the last word of a window the sums become
codes (behind the last layer they stay as they are) and go out as one word. Where a window lies over padding nothing is
added. When the output waits, everything stands still.

Signs times signs are XNOR and a count of bits, once for each plane of a code; other codes are looked up, and added,
subtracted or multiplied.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import memory, wiring

from lilliput.methods.circuits._fold import Folded
from lilliput.methods.circuits._net import Scale, Steps
from lilliput.methods.circuits._parts import counters, flow, later, lookup, rom, slices, times, tree
from lilliput.methods.circuits._words import Circuit, Value, joined, signed_bits


class Engine(wiring.Component):
    """A stream of words of `lanes` codes in, of `units` codes or sums out."""

    def __init__(self, folded: Folded):
        self.folded = folded
        self.product = folded.product
        super().__init__(flow(folded.lanes * self.product.bits, folded.units * folded.out_bits))

    def elaborate(self, platform: object) -> Module:
        m: Circuit = Module()
        step = Signal()
        m.d.comb += step.eq(~self.o.valid | self.o.ready)
        codes, weights, at = self._read(m, step)
        sums, done, group = self._sums(m, step, codes, weights, at)
        self._write(m, step, sums, done, group)
        return m

    # --- frames ------------------------------------------------------------------------------------------------

    def _read(self, m: Circuit, step: Value) -> tuple[Value, Value, dict[str, Value]]:
        """A word of codes and the word of weights for it in each cycle, and what they belong to."""
        f = self.folded
        halves = 2 * 2 ** sum(_bits(n) for n in f.words)
        m.submodules.frame = frame = memory.Memory(shape=unsigned(len(self.i.payload)), depth=halves, init=[])
        filled = Signal(2)
        self._fill(m, frame.write_port(), filled)
        reading, issue, read = Signal(), Signal(), frame.read_port()
        m.d.comb += issue.eq(step & filled.bit_select(reading, 1))
        (c, kx, ky, group, ox, oy), ends = counters(m, (*f.window, f.groups, *f.places), issue)
        with m.If(issue & ends[-1]):
            m.d.sync += [filled.bit_select(reading, 1).eq(0), reading.eq(~reading)]
        x, inside_x = self._place(m, ox, kx, f.words[1])
        y, inside_y = self._place(m, oy, ky, f.words[2])
        m.d.comb += [read.addr.eq(Cat(c, x, y, reading)), read.en.eq(step)]
        first = Signal(init=1)  # of the words of a window
        with m.If(issue):
            m.d.sync += first.eq(ends[2])
        (index,), _ = counters(m, (len(f.weight_words),), issue)
        weights = rom(m, "weights", f.weight_words, f.weight_width, index, step)
        at = {"valid": issue, "first": first, "last": ends[2], "inside": inside_x & inside_y, "group": group}
        return read.data, weights, later(m, step, at)

    def _fill(self, m: Circuit, write: memory.WritePort, filled: Value) -> None:
        """Words that arrive go to the half that is not read."""
        filling, take = Signal(), Signal()
        m.d.comb += [
            self.i.ready.eq(~filled.bit_select(filling, 1)),
            take.eq(self.i.valid & self.i.ready),
        ]
        (c, x, y), ends = counters(m, self.folded.words, take)
        m.d.comb += [write.addr.eq(Cat(c, x, y, filling)), write.data.eq(self.i.payload), write.en.eq(take)]
        with m.If(take & ends[-1]):
            m.d.sync += [filled.bit_select(filling, 1).eq(1), filling.eq(~filling)]

    def _place(self, m: Circuit, position: Value, tap: Value, size: int) -> tuple[Value, Value]:
        """Where in the frame a tap of the window at a position lies, and whether that is inside."""
        stride, padding = self.product.stride, self.product.padding
        if size == 1 and not padding:
            return Const(0, 0), Const(1, 1)
        place = sum([times(v, n) for v, n in ((position, stride), (tap, 1)) if len(v)], Const(0, 1))
        address = Signal(_bits(size))
        m.d.comb += address.eq(place - padding)
        inside = (place >= padding) & (place < size + padding) if padding else Const(1, 1)
        return address, inside

    # --- sums --------------------------------------------------------------------------------------------------

    def _sums(
        self, m: Circuit, step: Value, codes: Value, weights: Value, at: dict[str, Value]
    ) -> tuple[list[Value], Value, Value]:
        """The sum of each unit, whether it is complete, and its group of channels one step ahead."""
        f, planes = self.folded, self.product.planes and self.product.signs
        lanes = slices(codes, self.product.bits)
        values = lanes if planes else [self._value(code) for code in lanes]
        rows = [slices(row, f.weight_bits) for row in slices(weights, f.lanes * f.weight_bits)]
        now = later(m, step, at)
        done = later(m, step, {"done": now["valid"] & now["last"]})["done"]
        sums: list[Value] = []
        for unit, row in enumerate(rows):
            partial = Signal(signed(f.sum_bits), name=f"partial_{unit}")
            total = Signal(signed(f.sum_bits), name=f"total_{unit}")
            dot = self._count(values, row) if planes else self._multiply(values, row)
            with m.If(step):
                m.d.sync += partial.eq(Mux(at["inside"], dot, 0))
                with m.If(now["valid"]):
                    m.d.sync += total.eq(Mux(now["first"], 0, total) + partial)
            sums.append(total)
        return sums, done, now["group"]

    def _count(self, codes: list[Value], row: list[Value]) -> Value:
        """Planes of signs times signs: the equal ones less the others, each plane by its coefficient."""
        parts = []
        for plane, factor in enumerate(reversed(self.product.planes)):
            equal = tree([~(code[plane] ^ w[0]) for code, w in zip(codes, row)])
            parts.append(times(equal.shift_left(1) - len(codes), factor))
        return tree(parts)

    def _multiply(self, values: list[Value], row: list[Value]) -> Value:
        if self.product.signs:
            return tree([Mux(w[0], value, -value) for value, w in zip(values, row)])
        return tree([value * lookup(w, self.folded.weight_book) for value, w in zip(values, row)])

    def _value(self, code: Value) -> Value:
        """What a code stands for."""
        values = self.product.values.tolist()
        low = values[0]
        if values == list(range(low, low + len(values))):
            return code + low if low else code
        return lookup(code, values)

    # --- codes -------------------------------------------------------------------------------------------------

    def _write(self, m: Circuit, step: Value, sums: list[Value], done: Value, group: Value) -> None:
        """Sums become codes, and a word of them waits at the output."""
        encoder = self.product.encoder
        numbers = sums
        if isinstance(encoder, Steps):
            numbers = self._by_steps(m, step, sums, group, encoder)
        elif isinstance(encoder, Scale):
            numbers, done = self._by_scale(m, step, sums, group, encoder), later(m, step, {"done": done})["done"]
        with m.If(step):
            m.d.sync += [self.o.valid.eq(done), self.o.payload.eq(Cat(*numbers))]

    def _table(self, m: Circuit, step: Value, name: str, rows: list[int], width: int, group: Value) -> list[Value]:
        """The row of each unit for the sums that are complete."""
        units = self.folded.units
        words = [joined(rows[i : i + units], width) for i in range(0, len(rows), units)]
        return slices(rom(m, name, words, width * units, group, step), width)

    def _by_steps(self, m: Circuit, step: Value, sums: list[Value], group: Value, encoder: Steps) -> list[Value]:
        bits = self.folded.sum_bits
        columns = zip(encoder.thresholds.tolist(), encoder.falling.tolist())
        rows = [joined(thresholds, bits) << 1 | int(falls) for thresholds, falls in columns]
        width = encoder.thresholds.shape[1] * bits + 1
        numbers: list[Value] = []
        for total, row in zip(sums, self._table(m, step, "steps", rows, width, group)):
            passed = [(total >= threshold.as_signed()) ^ row[0] for threshold in slices(row[1:], bits)]
            code = Signal(encoder.bits, name=f"code_{len(numbers)}")
            m.d.comb += code.eq(lookup(tree(passed), encoder.codes.tolist()))
            numbers.append(code)
        return numbers

    def _by_scale(self, m: Circuit, step: Value, sums: list[Value], group: Value, encoder: Scale) -> list[Value]:
        pairs = list(zip(encoder.multiplier.tolist(), encoder.offset.tolist()))
        a, b = (max(signed_bits(n) for n in column) for column in zip(*pairs))
        rows = [joined([offset], b) << a | joined([factor], a) for factor, offset in pairs]
        largest = 2**encoder.bits - 1
        numbers: list[Value] = []
        for total, row in zip(sums, self._table(m, step, "scales", rows, a + b, group)):
            line = later(m, step, {"line": total * row[:a].as_signed() + row[a:].as_signed()})["line"]
            level = line.shift_right(encoder.shift)
            code = Signal(encoder.bits, name=f"code_{len(numbers)}")
            m.d.comb += code.eq(Mux(level < 0, 0, Mux(level > largest, largest, level)))
            numbers.append(code)
        return numbers


def _bits(size: int) -> int:
    """Of a counter up to size - 1."""
    return (size - 1).bit_length()
