"""`oapl …`: parses and dispatches. Bad input exits with 2 and one line; Ctrl-C with 130; a failure with 1.

Nothing heavy is imported before a command needs it: `oapl --help` and bad input are quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch loads its OpenMP library: idle threads must not spin on the cores that engine and trainer share.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from oapl_engine import __version__
from oapl_engine.config import Recipe
from oapl_engine.config_file import describe
from oapl_engine.errors import BAD_INPUT, DIFFERENCE, OK, ConfigError, find_modules_in, guarded
from oapl_engine.sft_config import SftRecipe, load_sft_recipe

SCHEMAS = {"`oapl train`": Recipe, "`oapl sft`": SftRecipe}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return guarded(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return BAD_INPUT
    code: int = arguments.run(arguments, rest)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oapl",
        description="Off-policy reinforcement learning of language models with OAPL (arXiv 2602.19362).",
        epilog="Exit codes: 0 done, 1 failed while running, 2 bad input, 3 a check found a difference, 130 stopped.",
    )
    parser.add_argument("--version", action="version", version=f"oapl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(run: Callable, text: str, epilog: str = "") -> Callable:
        shape = argparse.RawDescriptionHelpFormatter
        name = run.__name__.strip("_")
        command = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=shape)
        command.set_defaults(run=run)
        return command.add_argument

    fields = "TOML file; fields below are overridden with --section.field VALUE"
    argument = add(_train, "teach a model by a recipe; the same command again resumes", _fields_help(Recipe))
    argument("recipe", help=fields)
    text = "make the micro model: supervised warm start on generated examples"
    argument = add(_sft, text, _fields_help(SftRecipe))
    argument("recipe", help=fields)
    argument = add(
        _eval,
        "unbiased pass@k of models and runs on the same problems, with errors",
        "Further options override a recipe's fields: --data.path FILE, --sampling.max_new_tokens 4096, …",
    )
    argument("models", metavar="MODEL_OR_RUN", nargs="+", help="model folder or name, or a run directory")
    argument("--task", default="", help="aime25, math500, …, or SOURCE:NAME; default: the first run's own")
    argument("--n", type=int, default=16, help="samples per problem")
    argument("--k", default="", help="k of pass@k, comma-separated; default: powers of two to n")
    argument("--out", default="", help="results, picture and progress; the same command resumes")
    argument = add(_rollouts, "export the rollouts of a run, one JSON object per line")
    argument("run_dir", metavar="RUN", help="run directory")
    argument("--format", choices=["jsonl"], default="jsonl")
    argument = add(_figure, "draw a run: what it learned, or when it generated, verified, trained and published")
    argument("run_dir", metavar="RUN", help="run directory")
    argument("out", metavar="FILE", help="picture to write: .svg, .png or .pdf")
    argument("--kind", choices=["learning", "gantt"], default="learning", help="gantt: what worked when")
    text = "why a run does not learn; or, with --weights, whether a publish reaches a live engine completely"
    argument = add(_doctor, text)
    argument("run_dir", metavar="RUN", nargs="?", help="run directory: name the likely cause")
    argument("--weights", metavar="MODEL_DIR", help="publish perturbed weights, compare with a fresh load")
    add(_configuration, "print docs/configuration.md")
    return parser


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from oapl_engine.config import load_recipe

    load_recipe(arguments.recipe, overrides)  # before torch is loaded: a typo is reported within a second
    _check_interpreter()
    from oapl_engine.train import train

    return train(arguments.recipe, overrides)


def _sft(arguments: argparse.Namespace, overrides: list[str]) -> int:
    recipe = load_sft_recipe(arguments.recipe, overrides)
    _check_interpreter()
    from oapl_engine.sft import run_sft

    run_sft(recipe)
    return OK


def _eval(arguments: argparse.Namespace, overrides: list[str]) -> int:
    ks = _parse_ks(arguments.k, arguments.n)
    find_modules_in(Path.cwd())
    _check_interpreter()
    from oapl_engine.evaluation.report import evaluate_and_report

    evaluate_and_report(arguments.models, arguments.task, arguments.n, ks, arguments.out, overrides)
    return OK


def _parse_ks(text: str, n: int) -> list[int]:
    """k of pass@k; by default the powers of two up to n."""
    try:
        return [int(k) for k in text.split(",")] if text else [2**i for i in range(max(n, 1).bit_length())]
    except ValueError as error:
        raise ConfigError(f"--k {text}: whole numbers separated by commas, such as 1,4,16") from error


def _rollouts(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    from oapl_engine.rollout_log.export import export_rollouts

    run = Path(arguments.run_dir)
    if not (run / "rollouts").is_dir():
        raise ConfigError(f"{run} holds no rollouts/: name the directory of a run")
    for row in export_rollouts(run):
        print(json.dumps(row))
    return OK


def _figure(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    from oapl_engine.report.figure import plot_run
    from oapl_engine.report.gantt import plot_gantt

    plot = plot_gantt if arguments.kind == "gantt" else plot_run
    plot(Path(arguments.run_dir), Path(arguments.out))
    return OK


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`doctor RUN` reads the metrics; `doctor --weights MODEL_DIR` starts engines."""
    _refuse(rest)
    if bool(arguments.run_dir) == bool(arguments.weights):
        raise ConfigError("oapl doctor takes either a run directory or --weights MODEL_DIR")
    if arguments.run_dir:
        from oapl_engine.report.diagnosis import print_diagnosis

        print_diagnosis(Path(arguments.run_dir))
        return OK
    if not Path(arguments.weights).is_dir():
        raise ConfigError(f"--weights {arguments.weights} is not a folder: name one with config.json and the weights")
    _check_interpreter()
    from oapl_engine.doctor import check_weights

    difference = check_weights(arguments.weights)
    if difference:
        print(f"weights: {difference}")
    return DIFFERENCE if difference else OK


def _configuration(_: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    print(configuration_page(), end="")
    return OK


def _check_interpreter() -> None:
    """For commands that import transformers, which reads its own docstrings."""
    if sys.flags.optimize > 1:
        raise ConfigError("transformers cannot be imported under python -OO (PYTHONOPTIMIZE=2): use -O, or neither")


def _refuse(rest: list[str]) -> None:
    if rest:
        raise ConfigError(f"unknown argument {rest[0]}: see oapl --help")


def _fields_help(schema: type) -> str:
    """The fields of a recipe, for --help."""
    lines = ["fields of the recipe (TOML section, then --section.field):"]
    for section, why, fields in describe(schema):
        lines += ["", f"[{section}]  {why}"]
        for name, kind, default, text in fields:
            lines.append(f"  --{section}.{name} ({kind}; default {default})\n      {text}")
    return "\n".join(lines).replace("%", "%%")


def configuration_page() -> str:
    """docs/configuration.md, from the dataclasses."""
    lines = [
        "# Configuration",
        "",
        "Generated by `make docs` from oapl_engine/config.py. A recipe is TOML; any field can be overridden on the",
        "command line: `oapl train recipe.toml --schedule.lag 64`.",
    ]
    for title, schema in SCHEMAS.items():
        lines += ["", f"## {title}", *_section_tables(schema)]
    return "\n".join(lines) + "\n"


def _section_tables(schema: type) -> Iterator[str]:
    for section, why, fields in describe(schema):
        yield from ("", f"### [{section}]", why, "")
        yield from ("| field | type | default | unit and reason |", "|---|---|---|---|")
        for row in fields:
            cells = " | ".join(cell.replace("|", "\\|") for cell in row)
            yield f"| {cells} |"


if __name__ == "__main__":
    sys.exit(main())
