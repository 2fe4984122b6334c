"""Micro tasks for the micro model: generated problems over a vocabulary of 32 characters, answers checked exactly.

sort: "352810>" is answered "012358". addition: "385+467=" is answered by a scratchpad of column sums from the low end,
then ">" and the sum: "12,15,08>852"; only what follows ">" is scored.
"""

import random
from typing import Any

from oapl_engine.config import DataConfig
from oapl_engine.data.problem import Problem, Source, check_options
from oapl_engine.errors import ConfigError, nearest

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
VOCABULARY = [PAD, BOS, EOS, UNKNOWN, *"0123456789+-*/=<>:;,.()| \n?#"]
DEFAULTS = {"sort": {"digits": 6, "size": 2**16}, "addition": {"digits": 3, "size": 2**16}}


def micro_source(data: DataConfig) -> Source:
    """Source of micro task data.task. Options: digits (1 to 32), size (problems per epoch). Raises ConfigError."""
    task, options = data.task, data.options
    if task not in DEFAULTS:
        raise ConfigError(f'data.task = "{task}" is not a micro task; {nearest(task, DEFAULTS)}')
    settings = DEFAULTS[task] | options
    check_options(options, DEFAULTS[task], f"micro task {task}")
    for name, limit in (("digits", 32), ("size", 2**31)):
        if type(settings[name]) is not int or not 1 <= settings[name] <= limit:
            raise ConfigError(f"data.options.{name} = {settings[name]!r}: a whole number from 1 to {limit}")
    digits = settings["digits"]
    make = {"sort": _sort, "addition": _addition}[task]

    def problem(index: int) -> Problem:
        question, record = make(random.Random(f"{task}/{digits}/{index}"), digits)
        return Problem(f"{task}{digits}-{index}", question, record)

    marker = {"extract": "after", "marker": ">"} if task == "addition" else {}
    return Source(task, settings["size"], problem, finite=False, verifier="exact", verifier_options=marker)


def _sort(rng: random.Random, digits: int) -> tuple[str, dict[str, Any]]:
    text = "".join(rng.choices("0123456789", k=digits))
    answer = "".join(sorted(text))
    return f"{text}>", {"answer": answer, "solution": answer}


def _addition(rng: random.Random, digits: int) -> tuple[str, dict[str, Any]]:
    low = 10 ** (digits - 1) if digits > 1 else 0
    a, b = rng.randint(low, 10**digits - 1), rng.randint(low, 10**digits - 1)
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{total:02}")  # the same width for each: a micro model finds digits by their distance
        carry = total // 10
    return f"{a}+{b}=", {"answer": str(a + b), "solution": f"{','.join(steps)}>{a + b}"}


def micro_tokenizer() -> Any:
    """A fast tokenizer of transformers: one token per character of VOCABULARY; decode(encode(text)) == text.

    The chat template is the bare content.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer
