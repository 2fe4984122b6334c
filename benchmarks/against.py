"""This checkout against another, older one: the same measurements in both, in turn, medians of five.

Each measurement has a process in either checkout, which makes it ready and then takes one sample when it is asked: so
the samples of both alternate, and a machine that slows down slows both. benchmarks/_against_worker.py has the
measurements and what differs between the versions.

    python -m benchmarks against CHECKOUT [--rounds 5] [--only 1,4] [--small] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._against_worker import MEASUREMENTS

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "benchmarks" / "_against_worker.py"
GOLDEN = ROOT / "tests" / "unit" / "golden" / "scheduler.jsonl.gz"
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}  # the process that waits must not spin


def main(argv: list[str]) -> int:
    """Print the table: 0; 2 where CHECKOUT is not one of this project, or there is no measurement of a number."""
    parser = argparse.ArgumentParser(prog="benchmarks against", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of the other version, with its native code built")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each side")
    parser.add_argument("--only", help="numbers of the measurements to take, by commas, from 1")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    if not (options.checkout / "oapl_engine").is_dir():
        print(f"error: {options.checkout} is not a checkout of oapl-engine; name its root folder", file=sys.stderr)
        return 2
    names = dict(enumerate(MEASUREMENTS, 1))
    chosen = [int(n) if n.isdecimal() else 0 for n in options.only.split(",")] if options.only else list(names)
    if not set(chosen) <= set(names):
        print(f"error: --only {options.only}: numbers from 1 to {len(names)}, by commas", file=sys.stderr)
        return 2
    print(f"| {'measurement':27} | {'other':>12} | {'this':>12} | unit     | this/other |")
    print(f"|{'-' * 29}|{'-' * 14}|{'-' * 14}|{'-' * 10}|{'-' * 12}|")
    rows = []
    for number in chosen:
        rows.append(compare(names[number], options.checkout.resolve(), options.rounds, options.small))
        show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def show(row: dict[str, Any]) -> None:
    values = f"{row['other']:12.5g} | {row['this']:12.5g} | {row['unit']:8} | {row['ratio']:10.3f}"
    print(f"| {row['name']:27} | {values} |", flush=True)


def compare(name: str, other: Path, rounds: int, small: bool) -> dict[str, Any]:
    """Medians of both sides and their ratio; the samples too."""
    with _worker(name, other, small) as first, _worker(name, ROOT, small) as second:
        _read(first)  # both are ready before either is measured
        _read(second)
        samples = [(_sample(first), _sample(second)) for _ in range(rounds)]
    values = [[side["value"] for side in pair] for pair in samples]
    before, now = (statistics.median(side) for side in zip(*values, strict=True))
    row = {"name": name, "unit": samples[0][0]["unit"], "other": before, "this": now, "ratio": now / before}
    return row | {"samples": values}


@contextlib.contextmanager
def _worker(name: str, checkout: Path, small: bool) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | QUIET | {"PYTHONPATH": f"{checkout / 'kernels'}{os.pathsep}{checkout}"}
    command = [sys.executable, str(WORKER), name, "small" if small else "full", str(GOLDEN)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=checkout, env=environment, stdin=pipe, stdout=pipe, encoding="utf-8") as process:
        try:
            yield process
        finally:
            process.kill()


def _sample(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin
    print(file=process.stdin, flush=True)
    found: dict[str, Any] = json.loads(_read(process))
    return found


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended; its message is above")
    return line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
