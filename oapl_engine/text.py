"""Text to the tokens of a prompt, and the tokens of a response back to text: done here and nowhere else.

Training, rewards, evaluation, offline import and the engine share these answers, so that they cannot disagree.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oapl_engine.errors import ConfigError

TokenIds = Sequence[int] | NDArray[np.int32]
Message = dict[str, Any]  # {"role": "user", "content": "…"}


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt given as text, with the special tokens that the tokenizer adds: BOS once, also where the text
    starts with it already (a chat that was rendered before), and no EOS at the end, which would end the turn before it
    begins."""
    plain, ids = (list(tokenizer.encode(text, add_special_tokens=special)) for special in (False, True))
    starts = (start for start in range(len(ids) - len(plain) + 1) if ids[start : start + len(plain)] == plain)
    end = next(starts, 0) + len(plain)
    added = [token for token in ids[end:] if token != tokenizer.eos_token_id]
    return _with_one_bos(tokenizer, ids[:end] + added)


def encode_messages(tokenizer: Any, messages: Sequence[Message], system: str = "") -> list[int]:
    """Tokens of a prompt given as a chat, by the tokenizer's template with its generation prompt.

    system: goes first as a system message, unless the chat starts with one of its own

    The template writes the special tokens; none is added. Raises ConfigError where there is no template, or where it
    refuses the messages, as some refuse the role "system".
    """
    import jinja2

    check_has_template(tokenizer)
    if system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ConfigError(
            f"the model's chat template refuses messages with the roles {roles}: {error}. Where it has no place for a "
            "system message, leave data.system empty and put its text into the question"
        ) from error
    return _with_one_bos(tokenizer, list(tokenizer.encode(text, add_special_tokens=False)))


def _with_one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    while tokenizer.bos_token_id is not None and ids[:2] == 2 * [tokenizer.bos_token_id]:
        ids = ids[1:]
    return ids


def check_has_template(tokenizer: Any) -> None:
    """Raises ConfigError where the tokenizer cannot render a chat."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            'the tokenizer has no chat template: write data.template = "raw", or a text with '
            "{question} in it, or use a model that was trained to chat"
        )


def encode_response(tokenizer: Any, text: str, ends: Sequence[int]) -> list[int]:
    """Tokens of a finished response that is known as text, its end included: text loses the token that the policy
    sampled there, which is taken to be the tokenizer's EOS."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if not is_ended(ids, ends):
        ids.append(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0])
    return ids


def end_token_ids(model: str, tokenizer: Any, stop_token_ids: Iterable[int] = ()) -> tuple[int, ...]:
    """Token ids that end a response, ascending: those of the model folder's generation config (else of its config), the
    tokenizer's EOS, and `stop_token_ids` of the recipe.

    A model may end its turn with any of them: Llama-3 names two, and fine-tuned chat models come with a tokenizer whose
    EOS is not the config's. Raises ConfigError for ids outside the vocabulary, and where there is none at all.
    """
    ends = {*_configured_ends(model), *stop_token_ids}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    outside = [i for i in stop_token_ids if not 0 <= i < len(tokenizer)]
    if outside:
        raise ConfigError(
            f"sampling.stop_token_ids holds {outside[0]}: the tokens of {model} are 0 to {len(tokenizer) - 1}"
        )
    if not ends:
        raise ConfigError(
            f"{model} names no token that ends a response, neither in generation_config.json and config.json nor as "
            "the tokenizer's eos_token: set sampling.stop_token_ids"
        )
    return tuple(sorted(ends))


def _configured_ends(model: str) -> Iterable[int]:
    from transformers import AutoConfig, GenerationConfig

    file = Path(model, "generation_config.json")
    ends = None
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except (OSError, ValueError, TypeError) as error:
        if file.exists():  # else the model has none
            raise ConfigError(f"{file} cannot be read: {error}; correct it, or remove it") from error
    if ends in (None, []):
        config = AutoConfig.from_pretrained(model)
        file, ends = Path(model, "config.json"), config.get_text_config().eos_token_id
        if ends in (None, []):
            ends = config.eos_token_id  # of a model that also sees, beside the fields of its text
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    for token in ends:
        if type(token) is not int or token < 0:
            raise ConfigError(f"{file}: eos_token_id = {ends!r:.80} must be a token id or a list of them")
    return ends


def is_ended(token_ids: TokenIds, ends: Sequence[int]) -> bool:
    """Whether a response ended by itself. False: it was cut at the limit of its length."""
    return len(token_ids) > 0 and int(token_ids[-1]) in ends


def response_text(tokenizer: Any, token_ids: TokenIds, ends: Sequence[int]) -> str:
    """What a verifier reads: the response without the token that ended it, which need not be a special token, and
    without special tokens."""
    ids = np.asarray(token_ids).tolist()
    if is_ended(ids, ends):
        ids = ids[:-1]
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def describe_dialogue(tokenizer: Any, prompt: TokenIds, ends: Sequence[int]) -> list[str]:
    """Lines for the start of a run: a prompt as the model sees it, what ends a response, and what looks wrong."""
    ids = np.asarray(prompt).tolist()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ends)
    lines = [
        f"a prompt as the model sees it, {len(ids)} tokens: {tokenizer.decode(ids)!r}",
        f"a response ends with {shown}",
    ]
    adds_bos = bos is not None and tokenizer.encode("a")[:1] == [bos]
    if adds_bos and ids[:1] != [bos]:
        lines.append(
            f"warning: prompts do not start with {tokenizer.bos_token!r}, which the tokenizer adds to plain text: the "
            "chat template leaves it out"
        )
    if eos is not None and ids[-1:] == [eos]:
        lines.append(f"warning: prompts end with {tokenizer.eos_token!r}, so the turn is over before the response")
    return lines
