"""What a fit shows while it works: the step, what is being tried, the best so far, the time left."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar over the time limit; on a plain terminal or with `quiet` the steps are lines, or nothing."""

    def __init__(self, seconds: float, quiet: bool = False):
        self.seconds, self.quiet, self.start = seconds, quiet, time.monotonic()
        self.console = Console(stderr=True)
        self.live: Any = None
        self.line = ""

    def __enter__(self) -> Progress:
        if not self.quiet and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
            self.live = RichProgress(*columns, console=self.console)
            self.live.start()
            self.task = self.live.add_task("starting", total=self.seconds, left="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.stop()

    def step(self, what: str) -> None:
        """A new step begins."""
        self.line = what
        self._show(what)
        if self.live is None and not self.quiet:
            self.console.print(f"[{self._clock()}] {what}", markup=False, highlight=False)

    def say(self, what: str) -> None:
        """A detail of the current step; shown by the bar alone."""
        self._show(f"{self.line}: {what}")

    def best(self, what: str) -> None:
        """The best so far."""
        if not self.quiet:
            (self.live.console if self.live else self.console).print(f"[{self._clock()}] {what}", markup=False)

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self.start)
        return f"{seconds // 60:02d}:{seconds % 60:02d}"

    def _show(self, text: str) -> None:
        if self.live is None:
            return
        used = time.monotonic() - self.start
        left = max(0, int(self.seconds - used))
        self.live.update(self.task, description=text[:70], completed=used, left=f"{left // 60}:{left % 60:02d} left")
