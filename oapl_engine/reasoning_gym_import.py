"""reasoning_gym's data sets, mended: no pycosat needed, no response executed, the same problems in every process.

reasoning_gym imports pycosat at module level, which has no wheel and is needed for zebra puzzles only. Some scorers
call eval, or sympy's parse_expr, which calls it, on the text of a response. Some data sets choose from a set of texts,
whose order is another in every process.
"""

import ast
import functools
import importlib
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

from oapl_engine.errors import ConfigError

# modules whose scorers evaluate responses
EVAL = ("algorithmic.binary_matrix", "algorithmic.spiral_matrix", "algorithmic.string_insertion", "games.n_queens")
PARSE_EXPR = {
    "algebra.intermediate_integration": "sympy",
    "algebra.polynomial_multiplication": "sp",
    "algebra.simple_integration": "sympy",
    "games.countdown": None,
    "games.puzzle24": None,
}
FUNCTIONS = (
    *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "exp", "log", "sqrt", "Integral"),
)
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.UAdd, ast.USub)
MAX_CHARACTERS, MAX_EXPONENT = 2000, 100


@functools.cache
def reasoning_gym_registry() -> dict[str, tuple[Any, Any]]:
    """Class of data set and class of its config, by name."""
    provide_pycosat()
    from reasoning_gym.factory import DATASETS

    for name in EVAL:
        vars(importlib.import_module(f"reasoning_gym.{name}"))["eval"] = evaluate_literal
    for name, sympy in PARSE_EXPR.items():
        module: Any = importlib.import_module(f"reasoning_gym.{name}")
        if sympy:
            copy = types.ModuleType("sympy")
            vars(copy).update(vars(getattr(module, sympy)) | {"parse_expr": parse_arithmetic})
            setattr(module, sympy, copy)
        else:
            module.parse_expr = parse_arithmetic
    return dict(DATASETS)


def create_data_set(name: str, config: dict[str, Any]) -> Any:
    """The data set. Raises what it raises on a bad config."""
    make, make_config = reasoning_gym_registry()[name]
    made = make(config=make_config(**config))
    if isinstance(getattr(made, "letters", None), set):
        made.letters = SortedSet(made.letters)
    module: Any = sys.modules[make.__module__]
    if hasattr(module, "itermonomials"):
        from sympy import default_sort_key, itermonomials

        module.itermonomials = lambda *args: sorted(itermonomials(*args), key=default_sort_key)
    return made


def encode_entry(value: Any) -> Any:
    """An entry as JSON, tuples, sets and keys that are not texts kept; what else JSON lacks becomes its text."""
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {str(key): encode_entry(item) for key, item in value.items()}
        return {"__dict__": [[encode_entry(key), encode_entry(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple | set | frozenset):
        items = [encode_entry(item) for item in value]
        return items if isinstance(value, list) else {"__tuple__" if isinstance(value, tuple) else "__set__": items}
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return encode_entry(value.tolist())
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def decode_entry(value: Any) -> Any:
    """What `encode_entry` encoded."""
    if isinstance(value, list):
        return [decode_entry(item) for item in value]
    match value:
        case {"__tuple__": items}:
            return tuple(map(decode_entry, items))
        case {"__set__": items}:
            return set(map(decode_entry, items))
        case {"__dict__": pairs}:
            return {decode_entry(key): decode_entry(item) for key, item in pairs}
        case dict():
            return {key: decode_entry(item) for key, item in value.items()}
    return value


class SortedSet(set[str]):
    """A set whose order is the same in every process."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))

    def __sub__(self, other: Any) -> "SortedSet":
        return SortedSet(super().__sub__(other))


def evaluate_literal(text: str) -> Any:
    """The value of a Python literal. Raises ValueError on anything else."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:  # the last: too deep for Python's parser
        raise ValueError(f"not a literal: {error}") from error


def parse_arithmetic(text: str, local_dict: dict[str, Any] | None = None) -> Any:
    """sympy's parse_expr for arithmetic with names and elementary functions. Raises ValueError on anything else, and
    where powers would not be computed in moderate time."""
    import sympy

    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, limit {MAX_CHARACTERS}")
    try:
        _check_arithmetic(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an expression: {error}") from error
    return sympy.parse_expr(text, local_dict=local_dict)


def _check_arithmetic(node: ast.AST) -> None:
    match node:
        case ast.Constant(value=int() | float()) | ast.Name():
            return
        case ast.UnaryOp(op=op, operand=operand) if isinstance(op, OPERATORS):
            parts = [operand]
        case ast.BinOp(op=op, left=left, right=right) if isinstance(op, OPERATORS):
            parts = [left, right]
            if isinstance(op, ast.Pow):
                _check_power(left, right)
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in FUNCTIONS:
            _check_power(*parts)  # exp, sinh, …
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")
    for part in parts:
        _check_arithmetic(part)


def _check_power(*parts: ast.AST) -> None:
    """Of a base and its exponent, or of a function's argument: the last part is the exponent."""
    nodes = [node for part in parts for node in ast.walk(part)]
    constant = not any(isinstance(node, ast.Name) for node in nodes)
    if constant and any(isinstance(node, ast.Pow) for node in nodes):
        raise ValueError("a power of a power")
    numbers: list[Any] = [node.value for node in ast.walk(parts[-1]) if isinstance(node, ast.Constant)]
    if (constant or len(parts) > 1) and math.prod(max(1, abs(n)) for n in numbers) > MAX_EXPONENT:
        raise ValueError(f"an exponent over {MAX_EXPONENT}")


def provide_pycosat() -> None:
    """Call before importing reasoning_gym. Idempotent."""
    try:
        import pycosat
    except ImportError:
        pycosat = sys.modules["pycosat"] = types.ModuleType("pycosat")
    if not hasattr(pycosat, "itersolve"):
        pycosat.itersolve = pycosat.solve = _refuse


def _refuse(*_: Any, **__: Any) -> None:
    raise ConfigError(
        'data.task = "zebra_puzzles" needs the package pycosat, which is not installed: pip install pycosat (needs a C '
        "compiler), or choose another task"
    )
