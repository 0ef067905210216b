"""The one encoder gives the ids of transformers' `apply_chat_template`, over the chat templates of real models."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from infra.chat import load_codec
from infra.errors import ConfigError

NAMES = (
    "cohere", "deepseekv3", "gemma", "gemma3", "glm4moe", "gptoss", "lfm2", "llama3", "llama3_1", "llama3_2", "nemotron_3_nano", "phi3",
    "qwen2_5", "qwen2_5_training", "qwen3", "qwen3_instruct_2507", "qwen3_training", "smolvlm",
)  # fmt: skip
ASKED = {"role": "user", "content": 'What is 12 < 30 & "why"? Grüße, 日本'}
TOOL = {
    "type": "function",
    "function": {
        "name": "set_light", "description": "Sets a light's <level>",
        "parameters": {"type": "object", "properties": {"level": {"type": "integer"}}, "required": ["level"]},
    },
}  # fmt: skip
CALL = {"type": "function", "id": "call12345", "function": {"name": "set_light", "arguments": {"level": 3, "room": "küche"}}}
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"conversation": [ASKED]},
    "system": {"conversation": [{"role": "system", "content": " Be brief. "}, ASKED]},
    "several turns": {"conversation": [ASKED, {"role": "assistant", "content": "Because."}, ASKED]},
    "ended": {"conversation": [ASKED, {"role": "assistant", "content": "Because.\n"}], "add_generation_prompt": False},
    "tools": {"conversation": [ASKED], "tools": [TOOL]},
    "tool call": {
        "conversation": [
            ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "{\"ok\": true}", "tool_call_id": "call12345", "name": "set_light"}, ASKED,
        ],
        "tools": [TOOL],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def template_dir() -> Path:
    """Where the installed trl keeps the templates; the package is not imported."""
    files = metadata.distribution("trl").files or []
    found = next(entry for entry in files if entry.as_posix().endswith("chat_templates/qwen3.jinja"))
    return Path(str(found.locate())).parent


@pytest.fixture(scope="module")
def both(toy_model: Path, template_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Our codec and transformers' tokenizer, by template."""
    from transformers import AutoTokenizer

    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(toy_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copyfile(template_dir / f"{name}.jinja", folder / "chat_template.jinja")
        made[name] = (load_codec(folder), AutoTokenizer.from_pretrained(folder))
    return made


def reference(tokenizer: Any, chat: dict[str, Any]) -> list[int] | None:
    """transformers' ids, or None where the template refuses the chat."""
    try:
        ids = tokenizer.apply_chat_template(tokenize=True, return_dict=False, **{"add_generation_prompt": True, **chat})
    except Exception:  # each template refuses in its own way
        return None
    return list(ids)


@pytest.mark.parametrize("name", NAMES)
def test_encode_equals_transformers_for_every_chat(name: str, both: dict[str, tuple[Any, Any]]) -> None:
    codec, tokenizer = both[name]
    compared = 0
    for title, chat in CHATS.items():
        expected = reference(tokenizer, chat)
        arguments = (chat["conversation"], chat.get("tools"), chat.get("add_generation_prompt", True))
        if expected is None:
            with pytest.raises(ConfigError, match="chat template"):
                codec.encode(*arguments)
            continue
        assert codec.encode(*arguments) == expected, title
        compared += 1
    assert compared >= 3


def test_parity_compares_tools_and_tool_calls_in_at_least_ten_templates(both: dict[str, tuple[Any, Any]]) -> None:
    for title in ("tools", "tool call"):
        assert sum(reference(tokenizer, CHATS[title]) is not None for _, tokenizer in both.values()) >= 10


def test_decode_equals_transformers_and_hides_special_tokens(both: dict[str, tuple[Any, Any]]) -> None:
    codec, tokenizer = both["qwen3"]
    ids = codec.encode_text("<|im_start|>turn the lamp 12 , ok ? don 't 日本🙂<|im_end|>\n")
    assert codec.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == "turn the lamp 12 , ok ? don 't 日本🙂\n"
    stream = codec.stream_decoder()
    assert "".join(stream.feed(token) for token in ids) == codec.decode(ids)


def test_bos_is_written_once(both: dict[str, tuple[Any, Any]]) -> None:
    codec, _ = both["llama3"]
    ids = codec.encode(CHATS["one turn"]["conversation"], None, True)
    assert json.loads(codec.tokenizer.to_str())["added_tokens"][1]["content"] == "<|im_start|>"
    assert ids.count(1) == 1
