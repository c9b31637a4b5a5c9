"""The whole circuit: stages one behind the other, each taking words as soon as it can, and its Verilog."""

from __future__ import annotations

from amaranth.back import rtlil
from amaranth.hdl import Module
from amaranth.lib import wiring

from lilliput.methods.circuits._engine import Engine
from lilliput.methods.circuits._fold import Folded
from lilliput.methods.circuits._net import Encode, IntegerNet, Pool
from lilliput.methods.circuits._parts import flow
from lilliput.methods.circuits._pool import Largest
from lilliput.methods.circuits._scores import Coder, Winner
from lilliput.methods.circuits._words import Circuit


class Top(wiring.Component):
    """Bytes of a frame in, `lanes` a word, by row, column and channel; a word for each class out."""

    def __init__(self, net: IntegerNet, folded: list[Folded]):
        lanes, left = folded[0].lanes, iter(folded)
        self.stages: list[wiring.Component] = []
        for stage in net.stages:
            if isinstance(stage, Encode):
                self.stages.append(Coder(stage, lanes))
            elif isinstance(stage, Pool):
                self.stages.append(Largest(stage, lanes))
            else:
                engine = Engine(next(left))
                lanes = engine.folded.units
                self.stages.append(engine)
        last = folded[-1]
        self.winner = Winner(net.scores, last.product.bound, last.sum_bits, last.units)
        self.stages.append(self.winner)
        super().__init__(flow(8 * folded[0].lanes, len(self.winner.o.payload)))

    def elaborate(self, platform: object) -> Module:
        m: Circuit = Module()
        for i, stage in enumerate(self.stages):
            m.submodules[f"stage_{i}"] = stage
        for one, next_one in zip(self.stages, self.stages[1:]):
            wiring.connect(m, one.o, next_one.i)
        wiring.connect(m, wiring.flipped(self.i), self.stages[0].i)
        wiring.connect(m, self.stages[-1].o, wiring.flipped(self.o))
        return m


def to_rtlil(top: Top) -> str:
    """The circuit in the language that Yosys reads."""
    return rtlil.convert(top, name="top", emit_src=False)
