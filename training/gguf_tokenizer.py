"""The tokenizer and chat template that a GGUF file carries.

`AutoTokenizer.from_pretrained(gguf_file=...)` makes another tokenizer of them: it drops the splitting of digits, adds five tokens beyond
the vocabulary and takes the wrong stop token. So the parts are put together here, and only for those pre-tokenizers that are known.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

from infra.chat import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from infra.errors import ConfigError
from infra.files import write_json_atomic, write_text_atomic
from training.gguf import GgufFile

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _bytes_split_by_regex() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_bytes() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _bytes_split_by_regex()])


# Source: llama.cpp src/llama-vocab.cpp, by the name in tokenizer.ggml.pre.
PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {"gpt-2": _bytes_split_by_regex, "smollm": _digits_then_bytes}


def write_tokenizer(gguf: GgufFile, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises ConfigError for a tokenizer that is not known."""
    template = gguf.get("tokenizer.chat_template")
    build_tokenizer(gguf).save(str(folder / TOKENIZER_NAME))
    write_json_atomic(folder / TOKENIZER_CONFIG_NAME, tokenizer_config(gguf))
    write_text_atomic(folder / TEMPLATE_NAME, template)


def build_tokenizer(gguf: GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer of the file, control tokens as special tokens. Raises ConfigError."""
    model, pre = gguf.get("tokenizer.ggml.model"), gguf.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{gguf.path}: tokenizer {model!r} with pre-tokenizer {pre!r}; of GGUF files only 'gpt2' with {sorted(PRE_TOKENIZERS)} is "
            "converted. Name the same model as file: or hf: with its tokenizer.json."
        )
    tokens, types = gguf.get("tokenizer.ggml.tokens"), gguf.get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = ByteLevelDecoder()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in added if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == USER_DEFINED])
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise ConfigError(f"{gguf.path}: {len(tokens)} tokens of which some are the same. Fetch the model again.")
    return tokenizer


def tokenizer_config(gguf: GgufFile) -> dict[str, Any]:
    """What transformers reads beside tokenizer.json."""
    tokens = gguf.get("tokenizer.ggml.tokens")
    ids = {role: gguf.metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in ROLES.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.get("llama.context_length"),
        **{role: tokens[index] for role, index in ids.items() if index is not None},
    }
