"""A problem becomes the token ids of a prompt."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.config import DataConfig, check_template
from oapl_engine.data.problem import Problem
from oapl_engine.errors import ConfigError
from oapl_engine.text import check_has_template, encode_messages, encode_text

Render = Callable[[Problem], NDArray[np.int32]]


def renderer(data: DataConfig, tokenizer: Any) -> Render:
    """Function from a problem to token ids [P] i32, by data.template and data.system. Raises ConfigError.

    "chat": the tokenizer's chat template with the generation prompt; "raw": the question itself; else the template's
    text with {question} replaced (other braces stay as they are). A problem that is a chat already goes through the
    chat template as it is, behind data.system unless it starts with a system message of its own.
    """
    if data.template != "chat" and data.system:
        raise ConfigError(f'data.system is set, but data.template = "{data.template}" has no place for it: use "chat"')
    check_template(data.template)
    if data.template == "chat":
        check_has_template(tokenizer)

    def render(problem: Problem) -> NDArray[np.int32]:
        if problem.messages or data.template == "chat":
            messages = problem.messages or [{"role": "user", "content": problem.question}]
            ids = encode_messages(tokenizer, messages, data.system)
        else:
            text = problem.question if data.template == "raw" else data.template.replace("{question}", problem.question)
            ids = encode_text(tokenizer, text)
        if not ids:
            raise ConfigError(f"the question {problem.question!r} renders to no token: see data.template")
        return np.asarray(ids, np.int32)

    return render
