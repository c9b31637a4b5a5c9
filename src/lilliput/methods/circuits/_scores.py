"""The circuits at both ends: bytes into codes, and sums into scores and the class with the largest."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import wiring

from lilliput.methods.circuits._net import Encode, Scores
from lilliput.methods.circuits._parts import counters, flow, later, lookup, rom, slices, tree
from lilliput.methods.circuits._words import Circuit, joined, signed_bits


class Coder(wiring.Component):
    """Words of `lanes` bytes in, of as many codes out, in the same cycle."""

    def __init__(self, encode: Encode, lanes: int):
        self.steps = encode.steps
        super().__init__(flow(8 * lanes, encode.steps.bits * lanes))

    def elaborate(self, platform: object) -> Module:
        m: Circuit = Module()
        falls = bool(self.steps.falling[0])
        codes = []
        for byte in slices(self.i.payload, 8):
            passed = [(byte >= t) ^ falls for t in self.steps.thresholds[0].tolist()]
            code = Signal(self.steps.bits, name=f"code_{len(codes)}")
            m.d.comb += code.eq(lookup(tree(passed), self.steps.codes.tolist()))
            codes.append(code)
        m.d.comb += [self.o.payload.eq(Cat(*codes)), self.o.valid.eq(self.i.valid), self.i.ready.eq(self.o.ready)]
        return m


class Winner(wiring.Component):
    """Words of `lanes` sums in; one score a word out: the bit `last`, the best class so far, the score (signed)."""

    def __init__(self, scores: Scores, bound: int, sum_bits: int, lanes: int):
        self.pairs = list(zip(scores.multiplier.tolist(), scores.offset.tolist()))
        self.sum_bits, self.lanes = sum_bits, lanes
        largest = max(abs(a) * bound + abs(b) for a, b in self.pairs)
        self.score_bits, self.class_bits = signed_bits(largest), max(1, (len(self.pairs) - 1).bit_length())
        super().__init__(flow(lanes * sum_bits, 1 + self.class_bits + self.score_bits))

    def elaborate(self, platform: object) -> Module:
        m: Circuit = Module()
        step, move = Signal(), Signal()
        m.d.comb += [step.eq(~self.o.valid | self.o.ready), move.eq(step & self.i.valid)]
        (lane, _), ends = counters(m, (self.lanes, len(self.pairs) // self.lanes), move)
        m.d.comb += self.i.ready.eq(step & ends[0])
        (number,), _ = counters(m, (len(self.pairs),), move)
        a, b = (max(signed_bits(n) for n in column) for column in zip(*self.pairs))
        rows = [joined([offset], b) << a | joined([factor], a) for factor, offset in self.pairs]
        row = rom(m, "line", rows, a + b, number, step)
        total = Array(slices(self.i.payload, self.sum_bits))[lane] if self.lanes > 1 else self.i.payload
        held = later(m, step, {"valid": move, "sum": total, "last": ends[1], "number": number})
        line = held["sum"].as_signed() * row[:a].as_signed() + row[a:].as_signed()
        now = later(m, step, {"valid": held["valid"], "last": held["last"], "number": held["number"], "score": line})
        first, best, most = Signal(init=1), Signal(self.class_bits), Signal.like(now["score"])
        wins = first | (now["score"] > most)
        winner = Mux(wins, now["number"], best)
        with m.If(step):
            m.d.sync += [
                self.o.valid.eq(now["valid"]),
                self.o.payload.eq(Cat(now["last"], winner[: self.class_bits], now["score"][: self.score_bits])),
            ]
            with m.If(now["valid"]):
                m.d.sync += [first.eq(now["last"]), best.eq(winner), most.eq(Mux(wins, now["score"], most))]
        return m
