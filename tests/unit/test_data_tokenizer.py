"""The byte tokenizer, and that chats are tokenised as transformers would, without importing it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from slipstream.trainer.data.byte_tokenizer import SPECIAL_TOKENS, TOKENIZER_CONFIG, write_byte_tokenizer
from slipstream.trainer.data.tokenizer import ChatTokenizer, load_tokenizer
from slipstream.trainer.errors import DataError

TEMPLATES = {
    "trimmed blocks": (
        "{{ bos_token }}\n{%- for m in messages %}\n"
        "    {% if loop.first %}\n[{{ m.role }}]\n    {% endif %}\n"
        "{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}go{% endif %}"
    ),
    "loop control": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "no tools": (
        "{% if tools %}T{% endif %}{% if documents is defined and documents %}D{% endif %}{{ messages[0].content }}"
    ),
}
MESSAGES = [
    {"role": "system", "content": " Be <brief> & 'kind'. "},
    {"role": "user", "content": "Größe: 3 × 4?\n"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder)


def test_ids_are_bytes_then_specials(tokenizer: ChatTokenizer) -> None:
    assert len(tokenizer) == 261
    assert tokenizer.encode("A\n") == [65, 10]
    assert [tokenizer.encode(token) for token in SPECIAL_TOKENS] == [[256], [257], [258], [259], [260]]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.stop_token_ids) == (256, 260, (260,))


@given(text=st.text())
def test_any_text_survives(text: str, tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode(text)
    if not any(token in text for token in SPECIAL_TOKENS):
        assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_broken_utf8_decodes_to_the_replacement_character(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.decode([0xC3, 65, 260]) == "\ufffdA"


def test_chat(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.chat_tokens([{"role": "user", "content": "hi"}]).tolist() == [257, 104, 105, 260, 258]
    with pytest.raises(TemplateError, match="unknown role tool; allowed: system, user, assistant"):
        tokenizer.chat_text([{"role": "tool", "content": "hi"}])


@pytest.mark.parametrize("name", ["own", *TEMPLATES])
def test_chats_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_byte_tokenizer(tmp_path)
    config = {**TOKENIZER_CONFIG, "bos_token": {"content": "<|system|>", "__type": "AddedToken"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if name != "own":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    ours = load_tokenizer(tmp_path)
    assert ours.chat_tokens(MESSAGES).tolist() == expected
    assert ours.eos_token_id == reference.eos_token_id
    assert ours.decode(expected) == reference.decode(expected, skip_special_tokens=True)


def test_template_in_the_config_and_stop_tokens_of_the_generation_config(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**TOKENIZER_CONFIG, "chat_template": named}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [10, 260]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_text([{"role": "user", "content": "x"}]) == "x"
    assert tokenizer.stop_token_ids == (10, 260)


def test_unusable_tokenizers_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    cases = [(tmp_path, "no chat template; use the instruct version"), ("no/such-model", "is no folder")]
    torn = tmp_path / "torn"
    write_byte_tokenizer(torn)
    (torn / "tokenizer.json").write_text((torn / "tokenizer.json").read_text()[:200])
    bare = tmp_path / "bare"
    bare.mkdir()
    cases += [(torn, "cannot be read"), (bare, "has no tokenizer.json")]
    for path, expected in cases:
        with pytest.raises(DataError, match=expected) as error:
            load_tokenizer(path)
        assert str(error.value).startswith(f"model.path={str(path)!r}")
        assert "\n" not in str(error.value)


def test_neither_torch_nor_transformers_is_imported(folder: Path) -> None:
    code = (
        "import sys\n"
        "from slipstream.conf.schema import DataConfig, RewardConfig\n"
        "from slipstream.trainer.data.prompts import load_prompts\n"
        "from slipstream.trainer.data.rewards import RewardScorer\n"
        "from slipstream.trainer.data.tokenizer import load_tokenizer\n"
        f"prompts = load_prompts(DataConfig(), load_tokenizer({str(folder)!r}), 0)\n"
        "assert RewardScorer(RewardConfig()).score(prompts.train[0], '#### x').value == 0\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
