"""Whether two sympy expressions are equal: exactly where they are rational, at any magnitude, in bounded time.

sympy simplifies and evaluates nothing here. Rational numbers are compared as fractions. All else is evaluated by mpmath
with 120 and with 240 digits, at a few points where there are variables: the difference of the two is the rounding error
within which values count as equal. Numbers too large to compute are equal only if written alike.
"""

import math
import random
from fractions import Fraction
from typing import Any

import mpmath
import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

MAX_BITS = 1 << 19  # of a number that is computed: 2006! has 19,000, 100000! has 1,500,000
MAX_EXPONENT = 10**6
MAX_ITEMS = 50
MIN_PLACES = 6
DIGITS = (120, 240)
POINTS = ((1, 300), (1, 299), (-300, -1), (-300, 300))  # a variable is a multiple of 1/97 within these
TOLERANCE = mpmath.mpf(10) ** -60
CONSTANTS = {sympy.pi: mpmath.pi, sympy.E: mpmath.e, sympy.I: 1j, sympy.GoldenRatio: mpmath.phi}
FUNCTIONS = {
    getattr(sympy, name): getattr(mpmath, name)
    for name in ("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh")
} | {
    sympy.exp: mpmath.exp,
    sympy.log: mpmath.log,
    sympy.Abs: abs,
    sympy.floor: mpmath.floor,
    sympy.ceiling: mpmath.ceil,
    sympy.binomial: mpmath.binomial,
}
RATIONAL_OPERATIONS = (sympy.Add, sympy.Mul, sympy.Pow, sympy.factorial, sympy.UnevaluatedExpr)
MIRRORED = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}


class TooLargeError(ArithmeticError):
    """A number would not be computed in moderate time and memory."""


def equal(gold: Any, found: Any) -> bool:
    """Whether two answers are equal: numbers, expressions, equations, inequalities, sets, tuples, intervals, matrices.

    "x = 1" equals "1", also within a set. (1, 2) equals the list 1, 2 and the open interval, 1 < x < 2 the interval.
    """
    if _is_equation(found) and not _is_relation(gold):
        found = _items(found)[-1].rhs
    elif _is_assignment(gold) and not _is_relation(found):
        gold = _items(gold)[-1].rhs
    gold, found = _as_set(gold, found), _as_set(found, gold)
    gold, found = _as_item(gold, found), _as_item(found, gold)
    gold, found = _as_tuple(gold, found), _as_tuple(found, gold)
    for kind, compare in COMPARISONS:
        if isinstance(gold, kind) and isinstance(found, kind):
            return compare(gold, found)
    if isinstance(gold, sympy.Expr) and isinstance(found, sympy.Expr):
        return _equal_expressions(gold, found)
    return bool(gold == found)


def _is_relation(expr: Any) -> bool:
    return isinstance(expr, sympy.And | Relational)


def _is_equation(expr: Any) -> bool:
    return _is_relation(expr) and all(isinstance(part, sympy.Eq) for part in _items(expr))


def _is_assignment(expr: Any) -> bool:
    return _is_equation(expr) and isinstance(_items(expr)[0].lhs, sympy.Symbol | AppliedUndef)


def _as_set(one: Any, other: Any) -> Any:
    """A relation between a variable and numbers as an interval, where `other` is one."""
    if not (isinstance(other, sympy.Interval | sympy.Union) and _is_relation(one) and len(one.free_symbols) == 1):
        return one
    sides = [side for part in _items(one) for side in (part.lhs, part.rhs)]
    try:
        simple = all(side.is_Symbol or side.is_infinite or _fraction(side) is not None for side in sides)
        return one.as_set() if simple else one
    except (ArithmeticError, NotImplementedError, AttributeError):
        return one


def _as_tuple(one: Any, other: Any) -> Any:
    """(1, 2), which is read as an open interval, as a tuple where `other` is a list or a tuple; a list likewise."""
    if isinstance(one, sympy.Interval) and one.is_open and isinstance(other, sympy.Tuple | sympy.FiniteSet):
        return sympy.Tuple(one.start, one.end)
    between = isinstance(other, sympy.Tuple) or (isinstance(other, sympy.Interval) and other.is_open)
    return sympy.Tuple(*_items(one)) if isinstance(one, sympy.FiniteSet) and between else one


def _as_item(one: Any, other: Any) -> Any:
    """{1} as 1 where `other` is not a set."""
    alone = isinstance(one, sympy.FiniteSet) and len(_items(one)) == 1 and not isinstance(other, sympy.Set)
    return _items(one)[0] if alone else one


def _items(expr: Any) -> list[Any]:
    """Parts in the order in which they were written."""
    if isinstance(expr, sympy.And | sympy.Or | sympy.FiniteSet):
        return list(getattr(expr, "_unsorted_args", expr.args))
    return [expr] if isinstance(expr, Relational) else list(expr.args)


def _equal_in_order(gold: Any, found: Any) -> bool:
    ours, theirs = _items(gold), _items(found)
    return len(ours) == len(theirs) <= MAX_ITEMS and all(map(equal, ours, theirs))


def _equal_in_any_order(gold: Any, found: Any) -> bool:
    ours, theirs = _items(gold), _items(found)
    if not len(ours) == len(theirs) <= MAX_ITEMS:
        return False
    for item in ours:
        same = next((n for n, other in enumerate(theirs) if equal(item, other)), None)
        if same is None:
            return False
        del theirs[same]
    return True


def _equal_intervals(gold: Any, found: Any) -> bool:
    ends = (gold.left_open, gold.right_open) == (found.left_open, found.right_open)
    return bool(ends) and equal(gold.start, found.start) and equal(gold.end, found.end)


def _equal_matrices(gold: Any, found: Any) -> bool:
    same_shape = gold.shape == found.shape and len(gold) <= MAX_ITEMS
    return same_shape and all(map(equal, gold.flat(), found.flat()))


def _equal_relations(gold: Any, found: Any) -> bool:
    """Equal up to a factor, positive for inequalities."""
    kinds = [MIRRORED.get(type(side), type(side)) for side in (gold, found)]
    if kinds[0] is not kinds[1]:
        return False
    sides = [(side.rhs, side.lhs) if type(side) in MIRRORED else (side.lhs, side.rhs) for side in (gold, found)]
    try:
        samples = _samples(*sides[0], *sides[1])
    except (ArithmeticError, ValueError, TypeError):
        return bool(gold == found)
    ratios = []
    for a, b, c, d in samples:
        if _agree(a, b) != _agree(c, d):
            return False
        if not _agree(a, b):
            with mpmath.workdps(DIGITS[1]):
                ratios.append((c[1] - d[1]) / (a[1] - b[1]))
    if kinds[0] not in (sympy.Eq, sympy.Ne) and any(mpmath.re(ratio) <= 0 for ratio in ratios):
        return False
    with mpmath.workdps(DIGITS[1]):
        return len(ratios) > 1 and all(abs(ratio - ratios[0]) < TOLERANCE * abs(ratios[0]) for ratio in ratios)


def _equal_expressions(gold: Any, found: Any) -> bool:
    try:
        ours, theirs = _fraction(gold), _fraction(found)
        if ours is not None and theirs is not None and ours == theirs:
            return True
        if isinstance(gold, sympy.Float) or isinstance(found, sympy.Float):
            return _is_rounded(gold, found)
        samples = [] if ours is not None and theirs is not None else _samples(gold, found)
        return bool(samples) and all(_agree(*values) for values in samples)
    except (ArithmeticError, ValueError, TypeError):  # too large, or nothing that mpmath evaluates
        return bool(gold == found)


def _is_rounded(gold: Any, found: Any) -> bool:
    """Whether the shorter decimal is the other value, rounded or cut at its sixth decimal place or later."""
    (short, other), *_ = sorted(((gold, found), (found, gold)), key=lambda pair: _places(pair[0]))
    ((decimal, _), (exact, _)), *_ = _samples(short, other)
    difference, unit = abs(decimal - exact), mpmath.mpf(10) ** -_places(short)
    is_near = difference <= unit / 2 or (difference < unit and abs(decimal) < abs(exact))
    return bool(_places(short) >= MIN_PLACES and is_near and difference <= abs(exact) * 1e-5)


def _places(expr: Any) -> float:
    """Decimal places as written; none with an exponent."""
    text = repr(float(expr)) if isinstance(expr, sympy.Float) else ""
    return math.inf if not text else 0 if "e" in text else len(text.partition(".")[2])


def _samples(*exprs: Any) -> list[list[tuple[Any, Any]]]:
    """Values of the expressions with both numbers of DIGITS, at each point where all have one. Raises ArithmeticError
    where they have at fewer than two, ValueError where mpmath cannot evaluate them."""
    names = sorted({str(symbol) for expr in exprs for symbol in expr.atoms(sympy.Symbol, AppliedUndef)} - {"i"})
    samples = []
    for point in POINTS if names else POINTS[:1]:
        values = {name: Fraction(random.Random(f"{name}/{point}").randint(*point), 97) for name in names}
        try:
            samples.append([_sample(expr, values) for expr in exprs])
        except ZeroDivisionError:
            continue
    if len(samples) < min(2, len(names) + 1):
        raise ArithmeticError("undefined at the points")
    return samples


def _sample(expr: Any, values: dict[str, Fraction]) -> tuple[Any, Any]:
    results = []
    for digits in DIGITS:
        with mpmath.workdps(digits):
            results.append(_evaluate(expr, values))
    low, high = results
    if abs(low - high) > TOLERANCE * max(1, abs(high)):
        raise ZeroDivisionError("a pole")  # tan(π/2) is as large as the rounding error of π/2 lets it be
    return low, high


def _agree(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    with mpmath.workdps(DIGITS[1]):
        error = sum(abs(low - high) for low, high in (one, other))
        return bool(abs(one[1] - other[1]) <= error + max(abs(one[1]), abs(other[1])) * mpmath.mpf(10) ** -200)


def _evaluate(expr: Any, values: dict[str, Fraction]) -> Any:
    """In mpmath's working precision. Raises TooLargeError, ZeroDivisionError, ValueError."""
    if expr in CONSTANTS:
        return +mpmath.mpmathify(CONSTANTS[expr])
    if isinstance(expr, sympy.Symbol | AppliedUndef):
        return mpmath.mpc(0, 1) if str(expr) == "i" else _ratio(values[str(expr)])
    if isinstance(expr, sympy.Rational | sympy.Float):
        return _ratio(_fraction(expr) or Fraction(0))
    args = [_evaluate(arg, values) for arg in expr.args]
    if isinstance(expr, sympy.Add):
        return mpmath.fsum(args)
    if isinstance(expr, sympy.Mul):
        return mpmath.fprod(args)
    if isinstance(expr, sympy.UnevaluatedExpr):
        return args[0]
    if any(abs(arg) > MAX_EXPONENT for arg in (args[1:] if isinstance(expr, sympy.Pow) else args)):
        raise TooLargeError
    if isinstance(expr, sympy.Pow):
        return _root_or_power(args[0], args[1], expr.exp)
    if isinstance(expr, sympy.factorial):
        return mpmath.factorial(args[0])
    if type(expr) not in FUNCTIONS:
        raise ValueError(f"{type(expr).__name__} is not evaluated")
    return FUNCTIONS[type(expr)](*args)


def _ratio(value: Fraction) -> Any:
    return mpmath.mpf(value.numerator) / value.denominator


def _root_or_power(base: Any, exponent: Any, written: Any) -> Any:
    """An odd root of a negative number is the real one."""
    if (
        isinstance(written, sympy.Rational)
        and written.q % 2
        and written.q > 1
        and mpmath.im(base) == 0
        and base.real < 0
    ):
        return (-1) ** (written.p % 2) * (-base.real) ** exponent
    return base**exponent


def _fraction(expr: Any) -> Fraction | None:
    """The exact value of a rational number, None where it is none. Raises TooLargeError."""
    if isinstance(expr, sympy.Rational):
        return Fraction(int(expr.p), int(expr.q))
    if isinstance(expr, sympy.Float):
        return Fraction(repr(float(expr)))  # the shortest decimal that is this float is the one that was written
    if not isinstance(expr, RATIONAL_OPERATIONS):
        return None
    values = [value for arg in expr.args if (value := _fraction(arg)) is not None]
    if len(values) < len(expr.args):
        return None
    result: Fraction | None
    if isinstance(expr, sympy.Add):
        result = sum(values, Fraction(0))
    elif isinstance(expr, sympy.Mul):
        result = math.prod(values, start=Fraction(1))
    elif isinstance(expr, sympy.Pow):
        result = _power(values[0], values[1])
    elif isinstance(expr, sympy.factorial):
        result = _factorial(values[0])
    else:
        (result,) = values
    if result is not None and max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise TooLargeError
    return result


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and bits * abs(exponent) > MAX_BITS:
        raise TooLargeError
    return base ** int(exponent)


def _factorial(n: Fraction) -> Fraction | None:
    if n.denominator != 1 or n < 0:
        return None
    if n > 20_000:
        raise TooLargeError
    return Fraction(math.factorial(int(n)))


COMPARISONS = (
    (sympy.Tuple, _equal_in_order),
    (sympy.FiniteSet | sympy.Union | sympy.And | sympy.Or, _equal_in_any_order),
    (sympy.Interval, _equal_intervals),
    (sympy.MatrixBase, _equal_matrices),
    (Relational, _equal_relations),
)
