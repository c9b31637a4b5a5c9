"""Networks as circuits: what a network costs, or what it can hide, as gates.

A fitted model becomes Verilog for an FPGA and C++:

from lilliput.methods.circuits import Streaming

design = Streaming(cycles=2000).emit(fitted, workload)
design.write("circuit")                                   # top.v, net.cpp, testbench.v
print(design.simulate(design.net.read(pictures)).latency_cycles, design.synthesize("ecp5").luts)
"""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
