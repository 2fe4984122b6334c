r"""Reward 1 where the final answer of a response equals record["answer"] (LaTeX or plain), else 0.

Where it is in a response: `final_answer`. math-verify parses it, `equal` compares. As the graders of MATH do:
    units    a response without the record's unit, and one with a unit where the record has none, is right; one with
             another unit is wrong. Currencies and degrees are units. So are bases ("1101_2"), but a base that the
             record does not have is wrong.
    percent  "50", "50%" and "0.5" are right for "50%"; "50%" is right for "50" and for "0.5"
    words    are compared without case, blanks and punctuation; a choice "(B)" also with what follows it
    decimals count as equal to what they are rounded from at the sixth place or later, else they are exact

A response that cannot be read is wrong, with the reason. So is one too large to be evaluated, unless it is written like
the answer. Sizes are limited, not time: an alarm signal, math-verify's own limit, works in a main thread only.
"""

import functools
import logging
import re
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig

from oapl_engine.errors import ConfigError
from oapl_engine.rewards.math_text import TIME, Parts, final_answer, split_parts
from oapl_engine.rewards.math_value import equal

logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_CHARACTERS, MAX_DEPTH, MAX_DIGITS = 500, 6, 400  # the parser's time grows exponentially with depth
LATEX = math_verify.LatexExtractionConfig(
    boxed_match_priority=-1,
    normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none"),
)
NUMBER = re.compile(r"([+-]?) *(\d*\.?\d+|\d+\.)")
FRACTION = re.compile(r"([+-]?) *(?:\\frac *\{ *(\d+) *\} *\{ *(\d+) *\}|(\d+) */ *(\d+))")
TOO_LARGE = re.compile(rf"\d{{{MAX_DIGITS}}}|(?:binom|choose).*\d{{5}}|\d{{5}}.*choose")
TANGLED = re.compile(
    r"(?:\^\{[^{}^]*){5}|(?:[\^_][^{}\s^_]{0,4}){4}[\^_]|(?:\|[^|]*){11}|(?:,[^,]*){51}"
)  # slow like deep brackets
NOT_READ = re.compile(r"\d *_|[\d.] *\\overline")  # math-verify leaves them out
CHOICE = re.compile(r"\(?([A-J])\)?")
CHOSEN = re.compile(r"(?:\\text *\{)? *\(? *([A-J]) *(?:$|\}|\)|[.:]\s)(?! *[-+*/^=<>]| *\\text *\{ *or)")
WORDS = re.compile(
    r"(?:\\text *\{[^{}]*[A-Za-z][^{}]*\}|[\s,'-])+|[A-Za-z][A-Za-z\s,'-]{3,}|(?i:yes|no|odd|all|dne)|[A-Z]{2,}"
)
DATE = re.compile(r"\d{1,4}([/-])\d{1,2}\1\d{1,4}")


def check_options(options: dict[str, Any]) -> None:
    """There are none: raises ConfigError."""
    if options:
        raise ConfigError(f'reward.options = {options}: the verifier "math" has none; remove them')


def check_record(record: dict[str, Any], options: dict[str, Any]) -> None:
    """Raises ConfigError where the record's answer cannot be read."""
    del options
    answer = record.get("answer")
    if not isinstance(answer, str):
        raise ConfigError(f'"answer" = {answer!r}: the verifier "math" needs a text')
    try:
        _gold(answer)
    except ValueError as error:
        raise ConfigError(f'"answer" = {answer!r:.200} is not a mathematical expression: {error}') from error


def score(response: str, record: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    del options
    _gold(record["answer"])
    answer = ""
    try:
        answer = final_answer(response)
        right, reason = bool(answer) and _matches(record["answer"], answer), "" if answer else "no answer found"
    except Exception as error:  # whatever the parser raises on a response: it cannot be read, which is wrong
        right, reason = False, f"{type(error).__name__}: {error}"[:500]
    detail = {"answer": answer[:MAX_CHARACTERS] or None}
    return float(right), detail | {"reason": reason} if reason else detail


@functools.lru_cache(maxsize=1024)
def _gold(answer: str) -> tuple[Parts, Any]:
    """Parts and expression of a record's answer; None for words, times and dates. Raises ValueError."""
    parts = split_parts(_check_length(final_answer(answer) if "\\boxed" in answer else answer))
    if not _letters(parts.value):
        raise ValueError("nothing is left without units and punctuation")
    if any(pattern.fullmatch(parts.value) for pattern in (WORDS, TIME, DATE)):
        return parts, None
    return parts, _parse(parts.value)


def _matches(gold: str, answer: str) -> bool:
    """Raises ValueError where the answer cannot be read."""
    ours, right = _gold(gold)
    theirs = split_parts(_check_length(answer), letters=bool(ours.unit))
    if choice := CHOICE.fullmatch(_letters(ours.value)):
        chosen = CHOSEN.match(theirs.value)
        return bool(chosen and chosen[1] == choice[1])
    if right is None:
        return _same_words(ours.value, theirs.value)
    if not _units_agree(ours.unit, theirs.unit):
        return False
    found = _parse(theirs.value)
    if equal(right, found):
        return not theirs.percent or ours.percent or not _is_below_one(right)
    if ours.percent == theirs.percent:
        return False
    return equal(_hundredth(right), found) if ours.percent else equal(right, _hundredth(found))


def _parse(text: str) -> Any:
    """The sympy expression. Raises ValueError."""
    if TOO_LARGE.search(text) or TANGLED.search(text):
        raise ValueError(f"too large to be read: {text:.100}")
    if number := NUMBER.fullmatch(text):
        return sympy.Float(text, 15) if "." in text else sympy.Integer(f"{number[1]}{number[2]}")
    if fraction := FRACTION.fullmatch(text):
        numerator, denominator = (int(part) for part in fraction.groups()[1:] if part)
        if not denominator:
            raise ValueError(f"division by zero: {text:.100}")
        return sympy.Rational(numerator if fraction[1] != "-" else -numerator, denominator)
    _check_brackets(text)
    if NOT_READ.search(text):
        raise ValueError(f"not read: {text:.100}")
    found = math_verify.parse(f"${text}$", [LATEX], fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
    if not found:
        raise ValueError(f"not a mathematical expression: {text:.100}")
    return found[0]


def _check_length(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, limit {MAX_CHARACTERS}: {text:.100}")
    return text


def _check_brackets(text: str) -> None:
    depth = 0
    for bracket in re.findall(r"\\[{}]|[{}()\[\]]", text.replace("}{", "")):
        depth += 1 if bracket[-1] in "{([" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"brackets nested over {MAX_DEPTH} deep: {text:.100}")
    if text.replace("\\{", "").count("{") != text.replace("\\}", "").count("}"):
        raise ValueError(f"unbalanced braces: {text:.100}")


def _letters(text: str) -> str:
    return re.sub(r"\\text\b|[^\w()/:-]|[{}]", "", text)


def _same_words(gold: str, answer: str) -> bool:
    ours, theirs = TIME.fullmatch(gold), TIME.fullmatch(answer)
    if ours and theirs:
        half = [(time[2] or "").lower() for time in (ours, theirs)]
        return ours[1].lstrip("0") == theirs[1].lstrip("0") and (half[0] == half[1] or "" in half)
    return _letters(gold).strip("()").casefold() == _letters(answer).strip("()").casefold()


def _units_agree(gold: str, found: str) -> bool:
    if found.startswith("base") and found != "base 10" and found != gold:
        return False
    return not gold or not found or gold == found


def _is_below_one(expr: Any) -> bool:
    """A fraction, where a percentage would be more."""
    return isinstance(expr, sympy.Number) and bool(abs(expr) < 1)


def _hundredth(expr: Any) -> Any:
    return sympy.Mul(expr, sympy.Rational(1, 100), evaluate=False) if isinstance(expr, sympy.Expr) else expr
