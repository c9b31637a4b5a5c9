"""The circuit of a pooling: the largest code of each square, with one row of squares kept."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import memory, wiring

from lilliput.methods.circuits._net import Pool
from lilliput.methods.circuits._parts import counters, flow, slices
from lilliput.methods.circuits._words import Circuit, Value


class Largest(wiring.Component):
    """Words of `lanes` codes in and out; each takes two cycles, one to read what its square has and one to write."""

    def __init__(self, pool: Pool, lanes: int):
        self.pool, self.lanes = pool, lanes
        super().__init__(flow(lanes * pool.bits, lanes * pool.bits))

    def elaborate(self, platform: object) -> Module:
        m: Circuit = Module()
        squares, words = self.pool.out[2], self.pool.shape[0] // self.lanes
        depth = 2 ** (squares.bit_length() + (words - 1).bit_length())
        m.submodules.row = row = memory.Memory(shape=unsigned(len(self.i.payload)), depth=depth, init=[])
        write, read = row.write_port(), row.read_port()
        known, take = Signal(), Signal()  # what the square holds was read; the word is taken
        m.d.comb += take.eq(self.i.valid & known & (~self.o.valid | self.o.ready))
        m.d.sync += known.eq(self.i.valid & ~known | known & ~take)
        c, square, first, last = self._place(m, take)
        merged = Signal.like(self.i.payload)
        pairs = zip(slices(self.i.payload, self.pool.bits), slices(read.data, self.pool.bits))
        m.d.comb += [
            merged.eq(Mux(first, self.i.payload, Cat(*[Mux(new > old, new, old) for new, old in pairs]))),
            read.addr.eq(Cat(c, square)),
            write.addr.eq(Cat(c, square)),
            write.data.eq(merged),
            write.en.eq(take),
            self.i.ready.eq(take),
        ]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(take & last):
            m.d.sync += [self.o.valid.eq(1), self.o.payload.eq(merged)]
        return m

    def _place(self, m: Circuit, take: Value) -> tuple[Value, Value, Value, Value]:
        """Word of the place, square of the row, and whether the word is the first or the last of its square.

        Places that fill no square are counted with one past the last square.
        """
        (channels, height, width), size = self.pool.shape, self.pool.size
        (c, _, _), ends = counters(m, (channels // self.lanes, width, height), take)
        square, dx, dy = Signal(range(width // size + 1)), Signal(range(size)), Signal(range(size))
        column, row, frame = take & ends[0], take & ends[1], take & ends[2]
        with m.If(column):
            m.d.sync += dx.eq(Mux(dx == size - 1, 0, dx + 1))
            with m.If(dx == size - 1):
                m.d.sync += square.eq(square + 1)
        with m.If(row):
            m.d.sync += [dx.eq(0), square.eq(0), dy.eq(Mux(dy == size - 1, 0, dy + 1))]
        with m.If(frame):
            m.d.sync += dy.eq(0)
        full = (dx == size - 1) & (dy == size - 1)
        return c, square, (dx == 0) & (dy == 0), full
