"""A question becomes the token ids of a prompt."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.config import DataConfig, check_template
from oapl_engine.errors import ConfigError

Render = Callable[[str], NDArray[np.int32]]


def renderer(data: DataConfig, tokenizer: Any) -> Render:
    """Function from a question to token ids [P] i32, by data.template and data.system. Raises ConfigError.

    "chat": the tokenizer's chat template with the generation prompt; "raw": the question itself; else the template's
    text with {question} replaced (other braces stay as they are).
    """
    if data.template != "chat" and data.system:
        raise ConfigError(f'data.system is set, but data.template = "{data.template}" has no place for it: use "chat"')
    if data.template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            'data.template = "chat": the tokenizer has no chat template; write data.template = "raw", or a text with '
            "{question} in it"
        )
    check_template(data.template)

    def render(question: str) -> NDArray[np.int32]:
        if data.template == "chat":
            messages = [{"role": "system", "content": data.system}] if data.system else []
            messages.append({"role": "user", "content": question})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            # the template has written the special tokens already
            ids = tokenizer.encode(text, add_special_tokens=False)
        else:
            text = question if data.template == "raw" else data.template.replace("{question}", question)
            ids = tokenizer.encode(text)
        if not ids:
            raise ConfigError(f"the question {question!r} renders to no token: see data.template")
        return np.asarray(ids, np.int32)

    return render
