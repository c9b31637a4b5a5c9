"""C++ kernels as torch operators, one file per operation with a plain torch reference; chosen by instruction set.

The environment variable LILLIPUT_ISA (scalar, avx2 or avx512) overrides what the machine's best set is; `set_isa` does
so while a process runs. The operators use `torch.get_num_threads()` threads.
"""

from __future__ import annotations

from lilliput.errors import UserError
from lilliput.kernels import _native


def available_isas() -> list[str]:
    """The instruction sets that this build has and this machine can run, slowest first."""
    return _native.available_isas()


def isa() -> str:
    """The instruction set in use. Raises UserError when LILLIPUT_ISA names none that runs here."""
    try:
        return _native.isa()
    except RuntimeError as error:
        raise UserError(f"LILLIPUT_ISA: {error}") from None


def set_isa(name: str) -> None:
    """Use another instruction set from now on. Raises UserError when it does not run here."""
    try:
        _native.set_isa(name)
    except RuntimeError as error:
        raise UserError(str(error)) from None
