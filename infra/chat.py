"""One encoding of chats, used by trainer, evaluation and server alike.

- `tokenizers` and `jinja2`'s sandbox only; equality with `transformers.apply_chat_template` is held by a test.
- The template writes every special token itself, so none is ever added a second time.
- Engines and models receive the ids made here, never text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from infra.errors import ArtifactError, ConfigError
from infra.files import read_json

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
SPECIAL_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Byte-level tokenizers write printable bytes as themselves and the others, in order, as letters from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
BYTES_OF_LETTERS = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)}

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, with which some templates mark assistant text, and renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads a plain class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Any) -> str:
        return str(caller())


@dataclass(frozen=True)
class ChatCodec:
    """Messages to token ids and back, for one model folder."""

    tokenizer: Tokenizer
    template: jinja2.Template
    template_text: str
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False) -> str:
        """The prompt's text. Raises ConfigError when the template refuses the messages."""
        try:
            return self.template.render(
                messages=messages, tools=tools or None, documents=None, add_generation_prompt=add_generation_prompt, **self.special_tokens
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}") from error

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False) -> list[int]:
        """Token ids of the rendered messages. Raises ConfigError when the template refuses them."""
        return self.encode_text(self.render(messages, tools, add_generation_prompt))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, special tokens recognised where written and none added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """Text of one token, special or not; U+FFFD where it is part of a character."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> list[int]:
        """The bytes that one token stands for, also where they are part of a character."""
        name = self.tokenizer.id_to_token(token_id) or ""
        if BYTE_TOKEN.fullmatch(name):  # byte fallback, of tokenizers in the manner of SentencePiece
            return [int(name[3:5], 16)]
        text = self.token_text(token_id)
        if "\ufffd" in text and all(char in BYTES_OF_LETTERS for char in name):
            return [BYTES_OF_LETTERS[char] for char in name]
        return list(text.encode())

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one answer that arrives token by token."""
        return StreamDecoder(self.tokenizer)

    @property
    def template_digest(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256(self.template_text.encode()).hexdigest()


class StreamDecoder:
    """Turns token ids into text as they come, holding back incomplete characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is still incomplete."""
        return self._stream.step(self._tokenizer, token_id) or ""


def load_codec(folder: Path) -> ChatCodec:
    """The codec of a model folder (tokenizer.json, tokenizer_config.json, chat template). Raises ArtifactError when one is missing."""
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file. A fast tokenizer is needed; convert the model's tokenizer to {TOKENIZER_NAME}.")
    config = read_json(folder / TOKENIZER_CONFIG_NAME)
    text = _template_text(folder, config)
    special_tokens = {role: _token_text(config[role]) for role in SPECIAL_TOKEN_ROLES if config.get(role)}
    return ChatCodec(Tokenizer.from_file(str(path)), compile_template(text), text, special_tokens)


def compile_template(text: str) -> jinja2.Template:
    """A chat template, sandboxed, with the filters and globals that published templates expect. Raises ArtifactError on bad syntax."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_from_template
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ArtifactError(f"the chat template is not valid jinja2: {error}") from error


def _template_text(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / TEMPLATE_NAME
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stored = config.get("chat_template")
    if isinstance(stored, list):  # several named templates; the one called "default" serves chats
        stored = next((entry["template"] for entry in stored if entry.get("name") == "default"), None)
    if not stored:
        raise ArtifactError(f"{folder}: no {TEMPLATE_NAME} and none in {TOKENIZER_CONFIG_NAME}. A chat (instruct) model is needed.")
    return str(stored)


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, Mapping) else str(value)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # jinja2's own filter escapes HTML characters, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_from_template(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
