"""Progress for people: a live line on a terminal, plain lines when piped."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 5.0  # at most, between lines


class ProgressConsole(Console):
    """Falls silent when nobody reads it any more. Console itself ends the thread that prints, which may be the
    collector's: the run would wait for ever."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """Shows phase, step, reward, lag, tokens/s and the time left. Everything goes to stderr; stdout is for results."""

    def __init__(self, steps: int, window: int = 1, live: bool | None = None, silent: bool = False):
        self.steps, self.window = steps, window
        self.phase, self.detail, self.last_plain = "starting", "", 0.0
        self.row: dict[str, Any] = {}
        self.step_seconds: list[float] = []
        self.console = ProgressConsole(stderr=True, highlight=False, quiet=silent)
        wants_live = self.console.is_terminal if live is None else live
        self.live = Live(console=self.console, refresh_per_second=4) if wants_live and not silent else None
        if self.live:
            self.live.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def show_phase(self, phase: str, detail: str = "") -> None:
        """What is being done now, and how far it is."""
        changed, self.phase, self.detail = phase != self.phase, phase, detail
        if self.live:
            self.live.update(self._table())
        elif (changed and phase != "train" and self.window > 1) or time.monotonic() > self.last_plain + PLAIN_SECONDS:
            self.last_plain = time.monotonic()
            self.say(f"{phase} {detail}".rstrip())

    def show_step(self, row: dict[str, Any]) -> None:
        """A finished optimizer step: one row of metrics.jsonl."""
        self.row = row
        if row.get("time/step"):
            self.step_seconds.append(row["time/step"])
        self.last_plain = time.monotonic()
        if self.live:
            self.live.update(self._table())
        elif row["step"] % max(1, self.steps // 20) == 0 or row["step"] == 1:
            self.say(f"step {row['step']}/{self.steps}  {_summary(row)}  {self._left()}")

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        step = f"step {self.row.get('step', 0)}/{self.steps}"
        table.add_row(f"[bold]{self.phase}[/] {self.detail}", step, _summary(self.row), self._left())
        return table

    def _left(self) -> str:
        """Time left, once a complete window has been seen: its first step waited for all of the window's groups."""
        if len(self.step_seconds) < min(self.window, self.steps):
            return ""
        recent = self.step_seconds[-self.window :]
        seconds = sum(recent) / len(recent) * (self.steps - self.row.get("step", 0))
        return f"{seconds / 60:.1f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


def _summary(row: dict[str, Any]) -> str:
    forms = {"reward/all/mean": "reward %.3f", "loss": "loss %.4f", "off_policy/mean": "lag %.0f"}
    parts = [form % row[k] if row.get(k) is not None else f"{form.split()[0]} -" for k, form in forms.items()]
    if row.get("reward/all/invalid"):
        parts.append(f"invalid {row['reward/all/invalid']:.1%}")
    seconds = row.get("time/step")
    if seconds and row.get("tokens/trained") is not None:
        parts.append(f"{row['tokens/trained'] / seconds:.0f} tokens/s")
    return "  ".join(parts) if row else ""
