"""FPGAs: what they hold, from data sheets, and what of a circuit does not fit."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from lilliput.errors import UserError
from lilliput.methods.circuits._synthesis import CELLS, Resources

_FOLDER = Path(__file__).parents[2] / "devices" / "fpga"


@dataclass(frozen=True)
class Fpga:
    """Facts of one chip; `source` tells where each figure is from."""

    name: str
    family: str  # as Yosys has it
    luts: int
    flip_flops: int
    block_rams: int
    multipliers: int
    clock_mhz: float  # of the budget's latency where that names none; no circuit was placed to prove it
    source: dict[str, str]

    @classmethod
    def names(cls) -> list[str]:
        """Chips that come with the package."""
        return sorted(path.stem for path in _FOLDER.glob("*.toml"))

    @classmethod
    def known(cls, name: str) -> bool:
        """Whether a device's name or TOML file is that of an FPGA."""
        if not name.endswith(".toml"):
            return name in cls.names()
        try:
            return "family" in tomllib.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            return False

    @classmethod
    def load(cls, name: str) -> Fpga:
        """A chip by its name, or from a TOML file by its path. Raises UserError."""
        path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
        if not path.is_file():
            raise UserError(f"there is no FPGA {name!r}; give a TOML file or one of: {', '.join(cls.names())}")
        try:
            facts = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a TOML file: {error}") from None
        fields = {f.name for f in dataclasses.fields(cls)}
        if set(facts) != fields:
            wrong = sorted(fields ^ set(facts))
            raise UserError(f"the facts of the FPGA in {path} lack or wrongly hold: {', '.join(wrong)}")
        if facts["family"] not in CELLS:
            raise UserError(f"{path}: the family is {facts['family']!r}; choose one of {', '.join(CELLS)}")
        wrong = [
            k for k in ("luts", "flip_flops", "block_rams", "multipliers") if type(facts[k]) is not int or facts[k] < 0
        ]
        if wrong or not 0 < facts["clock_mhz"] < 10_000:
            raise UserError(f"{path}: {', '.join(wrong) or 'clock_mhz'} must be a number that makes sense")
        return cls(**facts)

    def lacks(self, used: Resources) -> list[str]:
        """What a circuit needs more of than there is, in words."""
        found = []
        for kind in ("luts", "flip_flops", "block_rams", "multipliers"):
            needed, there = getattr(used, kind), getattr(self, kind)
            if needed > there:
                found.append(f"{needed} {kind.replace('_', ' ')}, {self.name} has {there}")
        return found
