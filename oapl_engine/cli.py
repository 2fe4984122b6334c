"""`oapl …`: thin. Bad input exits with 2 and one line; Ctrl-C with 130; a failure while running with 1."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from oapl_engine import __version__
from oapl_engine.config import Recipe, load_recipe
from oapl_engine.config_file import describe
from oapl_engine.errors import BAD_INPUT, DIFFERENCE, FAILED, INTERRUPTED, OK, ConfigError, RunError
from oapl_engine.sft_config import SftRecipe, load_sft_recipe


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return BAD_INPUT
    return guarded(lambda: arguments.run(arguments, rest))


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`, with bad input and Ctrl-C told in one line."""
    try:
        return work()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


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
    add(_train, "teach a model by a recipe; the same command again resumes", _fields_help(Recipe))(
        "recipe", help=fields
    )
    text = "make the micro model: supervised warm start on generated examples"
    add(_sft, text, _fields_help(SftRecipe))("recipe", help=fields)
    argument = add(
        _eval,
        "unbiased pass@k of models and runs on the same problems, with errors",
        "Further options override a recipe's fields: --data.path FILE, --sampling.max_new_tokens 4096, …",
    )
    argument("models", metavar="MODEL_OR_RUN", nargs="+", help="model folder or name, or a run directory")
    argument("--task", default="", help="aime25, math500, …, or SOURCE:NAME; default: the first run's own")
    argument("--n", type=int, default=16, help="samples a problem")
    argument("--k", default="", help="k of pass@k, comma-separated; default: powers of two to n")
    argument("--out", default="", help="results, picture and progress; the same command resumes")
    argument = add(_rollouts, "export the rollouts of a run, one JSON object a line")
    argument("run_dir", metavar="RUN", help="run directory")
    argument("--format", choices=["jsonl"], default="jsonl")
    argument = add(_figure, "draw a run: what it learned, or when it generated, verified, trained and published")
    argument("run_dir", metavar="RUN", help="run directory")
    argument("out", metavar="FILE", help="picture to write: .svg, .png or .pdf")
    argument("--kind", choices=["learning", "gantt"], default="learning", help="gantt: who worked when")
    text = "why a run does not learn; or, with --weights, whether a publish reaches a live engine whole"
    argument = add(_doctor, text)
    argument("run_dir", metavar="RUN", nargs="?", help="run directory: name the likely cause")
    argument("--weights", metavar="MODEL_DIR", help="publish perturbed weights, compare with a fresh load")
    add(_configuration, "print docs/configuration.md")
    return parser


def _fields_help(schema: type) -> str:
    lines = ["fields of the recipe (TOML section, then --section.field):"]
    for section, why, fields in describe(schema):
        lines += ["", f"[{section}]  {why}"]
        lines += [
            f"  --{section}.{name} ({kind}; default {default})\n      {text}" for name, kind, default, text in fields
        ]
    return "\n".join(lines).replace("%", "%%")


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    recipe = load_recipe(arguments.recipe, overrides)
    _make_model(recipe, Path(arguments.recipe).parent)
    from oapl_engine.train import run_recipe

    return run_recipe(recipe)


def _make_model(recipe: Recipe, folder: Path) -> None:
    """Where the model is missing and a warm start beside the recipe writes it, make it first."""
    if Path(recipe.model.path).exists() or int(os.environ.get("RANK", "0")):  # other ranks wait for the first
        return
    for path in sorted(folder.glob("*sft*.toml")):
        sft = load_sft_recipe(path)
        if sft.model.out == recipe.model.path:
            print(f"{recipe.model.path} is missing: oapl sft {path}", file=sys.stderr)
            from oapl_engine.sft import run_sft

            run_sft(sft)
            return


def _sft(arguments: argparse.Namespace, overrides: list[str]) -> int:
    recipe = load_sft_recipe(arguments.recipe, overrides)
    from oapl_engine.sft import run_sft

    run_sft(recipe)
    return OK


def _rollouts(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    from oapl_engine.report.export import export_rollouts

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


def _eval(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Table and paired differences on stdout, progress on stderr, `pass_at_k.svg` beside the counts."""
    from rich.console import Console

    from oapl_engine.evaluation import compare as session
    from oapl_engine.evaluation.evaluate import compare
    from oapl_engine.report.figure import pass_at_k_table, plot_pass_at_k

    n = arguments.n
    try:
        ks = [int(k) for k in arguments.k.split(",")] if arguments.k else [2**i for i in range(max(n, 1).bit_length())]
    except ValueError as error:
        raise ConfigError(f"--k {arguments.k}: whole numbers separated by commas, such as 1,4,16") from error
    recipe = session.evaluation_recipe(arguments.models, arguments.task, n, ks, overrides)
    targets = [session.find_target(path) for path in arguments.models]
    name = arguments.task.replace(":", "-") or recipe.data.task or Path(recipe.data.path).stem
    out = Path(arguments.out or f"runs/eval-{Path(name).stem}")
    found = session.evaluate_targets(
        targets, recipe, bool(arguments.task), out, lambda text: print(text, file=sys.stderr, flush=True)
    )
    labels = [target.label for target in targets]
    curves = {label: [(k, *result.pass_at_k(k)) for k in ks] for label, result in zip(labels, found, strict=True)}
    paired = {
        label: [(k, *compare(found[0], r, k)) for k in ks] for label, r in list(zip(labels, found, strict=True))[1:]
    }
    title = f"{found[0].task}: {len(found[0].problems)} problems x {n} samples, temperature {found[0].temperature:g}"
    Console(width=None if sys.stdout.isatty() else 200).print(pass_at_k_table(curves, paired, title))
    plot_pass_at_k(curves, title, out / "pass_at_k.svg")
    print(f"done: models={len(found)} problems={len(found[0].problems)} n={n} out={out}")
    return OK


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`doctor RUN` reads the metrics; `doctor --weights MODEL_DIR` starts engines."""
    _refuse(rest)
    if bool(arguments.run_dir) == bool(arguments.weights):
        raise ConfigError("oapl doctor takes either a run directory or --weights MODEL_DIR")
    if arguments.run_dir:
        from oapl_engine.report.diagnosis import diagnose

        found = diagnose(Path(arguments.run_dir))
        for finding in found:
            print(f"{finding.cause}\n  seen: {finding.evidence}\n  try:  {finding.remedy}")
        print(f"doctor: {len(found)} likely causes" if found else "doctor: nothing stands out")
        return OK
    if not Path(arguments.weights).is_dir():
        raise ConfigError(f"--weights {arguments.weights} is no folder: name one with config.json and the weights")
    from oapl_engine.doctor import check_weights

    difference = check_weights(arguments.weights)
    if difference:
        print(f"weights: {difference}")
    return DIFFERENCE if difference else OK


def _configuration(_: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest)
    print(configuration_page(), end="")
    return OK


def _refuse(rest: list[str]) -> None:
    if rest:
        raise ConfigError(f"unknown argument {rest[0]}: see oapl --help")


def configuration_page() -> str:
    """docs/configuration.md, from the dataclasses."""
    lines = [
        "# Configuration",
        "",
        "Generated by `make docs` from oapl_engine/config.py. A recipe is TOML; any field can be overridden on the",
        "command line: `oapl train recipe.toml --schedule.lag 64`.",
    ]
    for title, schema in (("`oapl train`", Recipe), ("`oapl sft`", SftRecipe)):
        lines += ["", f"## {title}"]
        for section, why, fields in describe(schema):
            lines += [
                "",
                f"### [{section}]",
                why,
                "",
                "| field | type | default | unit and reason |",
                "|---|---|---|---|",
            ]
            rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in fields]
            lines += [f"| {row} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
