"""The console script `oapl`. Where the engine's packages are not installed, it says which extra brings them."""

import sys

MISSING = (
    "error: {package} is not installed: this installation has oapl_kernels only. The engine comes with an extra: "
    'pip install "oapl-engine[cuda]", or "oapl-engine[cpu]" on a machine without CUDA'
)


def main() -> int:
    """Returns the exit code of oapl_engine.cli.main, or 2."""
    try:
        from oapl_engine.cli import main as run
    except ModuleNotFoundError as error:
        print(MISSING.format(package=error.name), file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
