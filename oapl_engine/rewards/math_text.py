"""Text of mathematical answers: where the final answer of a response is, and its parts: value, unit, percent sign."""

import re
from dataclasses import dataclass

from oapl_engine.rewards.exact import NUMBER

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(BOX.pattern + r"|\\.|[{}]", re.S)
BETWEEN_BOXES = re.compile(r"[\s$,;.]*(?:and|or)?[\s$]*")
GSM8K = re.compile(r"#### *([^\n]+)")
SAID = re.compile(r"(?i:\b(?:answer|result)(?: to \w+ \w+)?\s*(?:is|are|:|=)[\s:=]*)")
ASIDE = re.compile(r"\.(?=\s|$)|\n|,?\s+(?:since|because|which|so|as|where|when|but|not|if)\b|,\s+(?=[a-z]{4})")
MATH = re.compile(
    r"(?<!\\)\$\$(.+?)\$\$|(?<![\\$])\$(?=\S)([^$]+?)(?<=\S)(?<!\\)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S
)
WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
MAX_SHORT = 200
MAX_TAIL = 5000  # characters of a response without a box in which the answer is looked for
IN_EXPRESSIONS = ("and", "or", "in", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "base", "text", "frac")
TIME = re.compile(r"(?:\\text *\{)?(\d{1,2}:\d\d)\s*(?:\\text *\{)?\s*(?:([AaPp])\.?\s*[Mm]\.?)?\}*")

UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "±": r"\pm ", "∈": r"\in ",
    "∅": r"\emptyset ",
    "°": r"^\circ ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "²": "^{2}", "³": "^{3}", "θ": r"\theta ", "…": r"\ldots ", "’": "'", "\u00a0": " ",
}  # fmt: skip
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^\s*[a-zA-Z]\^\{-1\} *\(\w\) *=", ""),
        (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt"),
        (r"\*\*|\\(?:left|right)(?![a-zA-Z])|\\displaystyle|\\quad|\\limits", ""),
        (r"(?<!\\)\\(?:! *|[,;:>])|(?<=\d)\{,\}(?=\d)", ""),
        (r"(?<!\\)\\ |~", " "),
        (r"\\text *\{ *(?:in )?base *\} *", "base "),
        (r"\\(?:mbox|textbf|textit|textrm|mathrm|mathbf|mathit|textnormal|operatorname)(?=\s*\{)", r"\\text"),
        (r"\\(?:dots|cdots)(?![a-zA-Z])|\.\.\.", r"\\ldots "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"(?<=\d)\s*(?:\^?\{?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?:st|nd|rd|th)\b)", ""),
        (r"(?<![\d.])(\d{1,3})((?:[ ,]\d{3})+)(?![\d,])", lambda m: m[1] + re.sub("[ ,]", "", m[2])),
        (r"(?<![\d/])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"(?<![A-Za-z\\\d.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d{1,9})(?!\d)", r"\1\\times 10^{\2}"),
        (r"\\sqrt\s*\(([^()]*)\)|(?<![\\a-z])sqrt\s*\(([^()]*)\)", lambda m: rf"\sqrt{{{m[1] or m[2]}}}"),
        (r"(?<![\d.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}", lambda m: _repeating(m[1], m[2], m[3])),
        (r"(?<![\d.])(\d*)\.(\d*?)((\d)\4\4+)\\ldots", lambda m: _repeating(m[1], m[2], m[4])),
        (r"(?<![\d.])(\d*)\.(\d*?)((\d\d+)\4+)\\ldots", lambda m: _repeating(m[1], m[2], m[4])),
    )
]
CURRENCIES = {
    r"\$": "dollar",
    "$": "dollar",
    "US$": "dollar",
    "€": "euro",
    "£": "pound",
    r"\pounds": "pound",
    "¥": "yen",
}
CURRENCY = re.compile(r"(?:US)?\\?\$|[€£¥]|\\pounds\s*")
PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|percent)\s*\}|percent)\s*$")
BASE = re.compile(r"_\s*\{?\s*(?:\\text\s*\{)?\s*(\d+|[a-z]{3,})\s*\}*$|\s*\(?(?:in )?base[ -](\d+|[a-z]+)\)?$")
BASES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
TEXT_UNIT = re.compile(r"(?<=[\d})\]i])\s*\\text\s*\{([^{}]*)\}(?:\s*\^\s*\{?([23])\}?)?$")
WORD_UNIT = re.compile(r"(?<=[\d})\]i])(\s*)(?<![A-Za-z\\])([A-Za-z][A-Za-z. /]*?)(?:\s*\^\s*\{?([23])\}?)?$")
DEGREE = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?\s*([CF]?)$")
UNITS = {
    alias: name
    for name, aliases in {
        "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
        "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram gm",
        "kg": "kilogram", "lb": "pound", "oz": "ounce", "s": "second sec", "min": "minute", "h": "hour hr",
        "day": "", "week": "", "month": "", "year": "yr", "l": "liter litre", "ml": "milliliter millilitre",
        "mph": "", "degree": "deg", "radian": "rad", "dollar": "usd buck", "cent": "", "unit": "",
    }.items()
    for alias in (name, *aliases.split())
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """An answer's text without `unit` ("" none; "base 2" is one) and without `percent` sign."""

    value: str
    unit: str = ""
    percent: bool = False


def final_answer(response: str) -> str:
    r"""What is in the last \boxed or \fbox, else after the last "####", else after the last "answer is", else all of
    it; of the latter three the last $…$, else a short text as a whole, else the last number. "" where there is none.

    Boxes with nothing but "and" between them are one answer. A box that is not closed is none: the response was cut.
    """
    if BOX.search(response):
        return _boxed(response)
    tail = response[-MAX_TAIL:]
    if marked := GSM8K.findall(tail):
        return _one_of(marked[-1])
    *_, said = [None, *SAID.finditer(tail := tail.replace("**", ""))]
    return _one_of(ASIDE.split(tail[said.end() :])[0] if said else tail)


def _one_of(text: str) -> str:
    """The last $…$ in a text, else a short text as a whole, else its last number."""
    text = text.strip()
    if math := MATH.findall(text):
        return next(filter(None, math[-1])).strip()
    if len(text) <= MAX_SHORT and (text.isdecimal() or _is_bare(text)):
        return text
    *_, number = ["", *NUMBER.finditer(text)]
    return number and number[0] + _unit_after(text[number.end() :])


def _is_bare(text: str) -> bool:
    """Whether it is words alone, or an expression with a unit at most."""
    words = [word for word in WORDS.finditer(text) if word[0].lower() not in IN_EXPRESSIONS]
    digits = [n for n, character in enumerate(text) if character.isdigit()]
    return not words or (len(words) <= 4 and (not digits or words[0].start() > digits[-1]))


def _unit_after(text: str) -> str:
    word = re.match(r"\s?(\\?%|[A-Za-z]+)", text)
    is_unit = word and (word[1].endswith("%") or word[1] == "percent" or _unit(word[1], None) in UNITS.values())
    return word[0] if word and is_unit else ""


def split_parts(text: str, letters: bool = False) -> Parts:
    """The parts of an answer. letters: whether a word like "m" after a number is a unit, not a variable."""
    text = _rewrite(text)
    if TIME.fullmatch(text):
        return Parts(text)
    if percent := PERCENT.search(text):
        return Parts(text[: percent.start()].strip(), percent=True)
    text, unit = _take_currency(text)
    if degree := DEGREE.search(text):
        return Parts(text[: degree.start()].strip(), f"degree{degree[1]}")
    if base := BASE.search(text):
        number = base[1] or base[2]
        if re.search(r"\d\s*\}?$|\d\)?$|[A-F]$", text[: base.start()]) and (number.isdigit() or number in BASES):
            return Parts(text[: base.start()].strip("() "), f"base {BASES.get(number, number)}")
    if worded := TEXT_UNIT.search(text):
        return Parts(text[: worded.start()].strip(), _unit(worded[1], worded[2]))
    if (word := WORD_UNIT.search(text)) and _is_unit(word, letters):
        return Parts(text[: word.start()].strip(), _unit(word[2], word[3]))
    return Parts(text, unit)


def _boxed(text: str) -> str:
    """What is in the last box, the innermost one of several around it."""
    answer, last = "", 0
    for start, inner, end in _boxes(text):
        joined = answer and BETWEEN_BOXES.fullmatch(text, last + 1, start)
        answer = f"{answer},{text[inner:end].strip()}" if joined else text[inner:end].strip()
        last = end
    return answer


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Start, start of the content and end of boxes without a box inside, in one pass: responses may hold thousands."""
    boxes: list[tuple[int, int, int]] = []
    openings: list[tuple[int, int, bool]] = []
    for brace in BRACE.finditer(text):
        if brace[0] == "{" or BOX.fullmatch(brace[0]):
            openings.append((brace.start(), brace.end(), len(brace[0]) > 1))
        elif brace[0] == "}" and openings:
            start, inner, is_box = openings.pop()
            if is_box and not (boxes and boxes[-1][0] > start):
                boxes.append((start, inner, brace.start()))
    return boxes


def _rewrite(text: str) -> str:
    for character, latex in UNICODE.items():
        text = text.replace(character, latex)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    worded = re.fullmatch(r"\\text\s*\{([^{}]*\d[^{}]*)\}", text)
    return worded[1].strip() if worded else text


def _repeating(whole: str, once: str, block: str) -> str:
    denominator = (10 ** len(block) - 1) * 10 ** len(once)
    numerator = int((whole + once + block) or 0) - int((whole + once) or 0)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _take_currency(text: str) -> tuple[str, str]:
    sign = CURRENCY.search(text)
    if not sign:
        return text, ""
    return CURRENCY.sub("", text).strip(), CURRENCIES.get(sign[0].strip(), "")


def _is_unit(word: re.Match[str], letters: bool) -> bool:
    name, known = word[2].strip(), _unit(word[2], None).partition("^")[0] in UNITS.values()
    alone = bool(word[1]) and bool(re.fullmatch(r"[-+\d.,/\s]+", word.string[: word.start()]))
    return (known and (letters or alone or len(name) > 1)) or (bool(word[1]) and len(name) > 3)


def _unit(words: str, power: str | None) -> str:
    names = [w.strip(".").lower() for w in words.replace("/", " / ").split()]
    power = power or ("2" if {"square", "sq"} & {*names} else "3" if {"cubic", "cu"} & {*names} else "")
    plain = [n for n in names if n not in ("square", "sq", "cubic", "cu", "squared", "cubed")]
    base = " ".join(UNITS.get(n, UNITS.get(n.removesuffix("s"), n.removesuffix("s"))) for n in plain)
    return f"{base}^{power}" if power else base
