"""`python -m benchmarks NAME …` runs benchmarks/NAME.py; without a name, lists what there is."""

import difflib
import importlib
import pkgutil
import sys

import benchmarks
from oapl_engine.errors import guarded


def main(argv: list[str]) -> int:
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_"))
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [--json FILE]\nnames:", ", ".join(names))
        return 0
    if argv[0] not in names:
        near = difflib.get_close_matches(argv[0], names, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names)}"
        print(f"error: unknown benchmark {argv[0]}; {hint}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
