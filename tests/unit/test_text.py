"""Prompts, ends and texts of responses: what tokenizers and configurations as people have them give."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from oapl_engine import text
from oapl_engine.data.micro import micro_tokenizer
from oapl_engine.errors import ConfigError

PAD, BOS, EOS, ZERO, QUESTION, HASH = 0, 1, 2, 4, 30, 31
USER = [{"role": "user", "content": "12>"}]


def tokenizer_that_adds(single, template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"):
    tokenizer = micro_tokenizer()
    special = [("<bos>", BOS), ("<eos>", EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("single", ["<bos> $A", "<bos> $A <eos>"])
@pytest.mark.parametrize("question", ["12>", "<bos>12>"])
def test_a_prompt_has_one_bos_and_no_added_eos(single, question):
    """Llama-3 and Gemma add a BOS, tokenizers with add_eos_token an EOS; a text rendered before has its BOS already."""
    tokenizer = tokenizer_that_adds(single)
    assert text.encode_text(tokenizer, question) == [BOS, 5, 6, 20]
    assert text.encode_messages(tokenizer, USER) == [BOS, 5, 6, 20]


def test_a_tokenizer_without_bos_adds_none():
    assert text.encode_text(micro_tokenizer(), "12>") == [5, 6, 20]
    assert text.encode_text(tokenizer_that_adds("$A"), "12><eos>") == [5, 6, 20, EOS]  # the user's own


def test_a_template_that_starts_twice_is_cut():
    tokenizer = tokenizer_that_adds("<bos> $A", "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}")
    assert text.encode_messages(tokenizer, USER) == [BOS, 5, 6, 20]


def test_a_template_that_refuses_a_role_is_bad_input():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    tokenizer = tokenizer_that_adds("$A", refusing)
    with pytest.raises(
        ConfigError, match=r"refuses messages with the roles system, user: no system messages.*data\.system"
    ):
        text.encode_messages(tokenizer, [{"role": "system", "content": "Be brief."}, *USER])


def test_a_system_message_goes_first_unless_the_chat_has_one():
    tokenizer = tokenizer_that_adds("$A")
    assert text.encode_messages(tokenizer, USER, "7") == [BOS, 11, 5, 6, 20]
    own = [{"role": "system", "content": "8"}, *USER]
    assert text.encode_messages(tokenizer, own, "7") == [BOS, 12, 5, 6, 20]


@pytest.fixture
def folder(model_folder, tmp_path):
    """folder(config ids, generation ids): a copy of a model whose configuration names these ends."""

    def make(config, generation):
        path = shutil.copytree(model_folder("llama"), tmp_path / f"{config}-{generation}")
        for name, ends in (("config.json", config), ("generation_config.json", generation)):
            content = json.loads((path / name).read_text()) if (path / name).exists() else {}
            (path / name).write_text(json.dumps(content | {"eos_token_id": ends}))
        return str(path)

    return make


def test_ends_are_those_of_all_that_name_one(folder):
    """Llama-3 names two in its generation config; a fine-tuned model's tokenizer names another than its config."""
    tokenizer = micro_tokenizer()
    assert text.end_token_ids(folder(EOS, [EOS, QUESTION]), tokenizer) == (EOS, QUESTION)
    assert text.end_token_ids(folder(HASH, HASH), tokenizer) == (EOS, HASH)
    assert text.end_token_ids(folder(HASH, None), tokenizer, [QUESTION]) == (EOS, QUESTION, HASH)
    with pytest.raises(ConfigError, match="stop_token_ids holds 999"):
        text.end_token_ids(folder(EOS, EOS), tokenizer, [999])
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="names no token that ends a response"):
        text.end_token_ids(folder(None, None), tokenizer)


@pytest.mark.parametrize("ends", [-1, "<eos>", 2.0, [EOS, None], True])
def test_ends_that_are_not_token_ids_are_named(folder, ends):
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id = "):
        text.end_token_ids(folder(EOS, ends), micro_tokenizer())


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_generation_config_is_named(folder, content):
    """It is not the same as none: its ends would be lost without a word."""
    path = Path(folder(EOS, HASH), "generation_config.json")
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read"):
        text.end_token_ids(str(path.parent), micro_tokenizer())


def test_an_empty_list_names_no_end(folder):
    assert text.end_token_ids(folder(HASH, []), micro_tokenizer()) == (EOS, HASH)


@pytest.mark.parametrize("end", [EOS, HASH])
def test_a_verifier_reads_the_answer_without_its_end(end):
    """The end need not be a token that the tokenizer calls special."""
    tokenizer = micro_tokenizer()
    ids = [*tokenizer.encode("012358"), end]
    assert text.response_text(tokenizer, ids, (EOS, HASH)) == "012358"
    assert text.is_ended(ids, (EOS, HASH))
    assert text.response_text(tokenizer, [ZERO, HASH, ZERO], (EOS, HASH)) == "0#0"  # cut at the limit
    assert not text.is_ended([ZERO], (EOS, HASH))
    assert not text.is_ended([], (EOS,))


def test_text_of_others_gets_the_end_that_it_lost():
    tokenizer = micro_tokenizer()
    assert text.encode_response(tokenizer, "01", (EOS, HASH)) == [4, 5, EOS]
    assert text.encode_response(tokenizer, "01#", (EOS, HASH)) == [4, 5, HASH]


def test_the_start_of_a_run_shows_a_prompt_and_what_is_odd():
    tokenizer = tokenizer_that_adds("<bos> $A")
    lines = text.describe_dialogue(tokenizer, [BOS, 5, 6, 20], (EOS, HASH))
    assert lines == [
        "a prompt as the model sees it, 4 tokens: '<bos>12>'",
        f"a response ends with '<eos>' (2), '#' ({HASH})",
    ]
    odd = text.describe_dialogue(tokenizer, [5, 6, EOS], (EOS,))
    assert [line.split(" with ")[0] for line in odd[2:]] == [odd[2].split(" with ")[0], "warning: prompts end"]
    assert "do not start with '<bos>'" in odd[2]
