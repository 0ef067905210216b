"""Whether the folders of one run belong together, from their manifests and small files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.chat import TOKENIZER_NAME, load_codec
from infra.contracts import AdapterFacts, Manifest, ModelFacts
from infra.files import read_json, sha256_file
from pipelines.proof.checks import Check, listed
from pipelines.step import Artifact

CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
SAME_FACTS = ("tokenizer_digest", "chat_template_digest", "special_tokens", "context_tokens", "stop_ids")
OWN_KEYS = frozenset({"_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version", "use_cache"})
"""Of config.json, what an exporter may write anew; all else decides what the model computes."""


def check_lineage(stage: str, artifact: Artifact, parents: Mapping[str, Artifact], base: Artifact, more: Sequence[str] = ()) -> Check:
    """Whether an artifact was made of `parents`, by the role that its manifest gives them, and is a model of `base`."""
    problems = [*more, *parent_problems(artifact.manifest, parents)]
    if artifact.manifest.model is not None and base.manifest.model is not None:
        problems += fact_problems(artifact.manifest.model, base.manifest.model, base.manifest.digest if stage != "base" else None)
        if artifact.manifest.kind != "adapter":
            problems += folder_problems(artifact, base.path)
    made_of = ", ".join(parents) or "nothing before it"
    return listed("lineage", stage, f"manifest and configuration of {stage} with {made_of}", problems, "of this run")


def parent_problems(manifest: Manifest, parents: Mapping[str, Artifact]) -> list[str]:
    """Digests of parents that are not those of this run."""
    return [
        f"made of the {role} {_short(manifest.parents.get(role))}, this run has {_short(parent.manifest.digest)}: stale, or of another run"
        for role, parent in parents.items()
        if manifest.parents.get(role) != parent.manifest.digest
    ]


def fact_problems(facts: ModelFacts, base: ModelFacts, base_digest: str | None) -> list[str]:
    """Facts of a model that are not its base's; `base_digest` is None for the base itself."""
    problems = [
        f"{name} is {_told(getattr(facts, name))}, the base has {_told(getattr(base, name))}"
        for name in SAME_FACTS
        if getattr(facts, name) != getattr(base, name)
    ]
    if base_digest is not None and facts.base_digest != base_digest:
        problems.append(f"made for the base {_short(facts.base_digest)}, this run has {_short(base_digest)}: another base model")
    return problems


def folder_problems(artifact: Artifact, base_dir: Path) -> list[str]:
    """What a model folder's own files say otherwise than its manifest or than the base's."""
    facts, folder = artifact.manifest.model, artifact.path
    assert facts is not None
    problems = []
    if (found := sha256_file(folder / TOKENIZER_NAME)) != facts.tokenizer_digest:
        problems.append(f"{TOKENIZER_NAME} has digest {_short(found)}, the manifest says {_short(facts.tokenizer_digest)}")
    if (found := load_codec(folder).template_digest) != facts.chat_template_digest:
        problems.append(f"the chat template has digest {_short(found)}, the manifest says {_short(facts.chat_template_digest)}")
    config, wanted = read_json(folder / CONFIG_NAME), read_json(base_dir / CONFIG_NAME)
    problems += config_problems(config, wanted)
    if (context := config.get("max_position_embeddings")) != facts.context_tokens:
        problems.append(f"{CONFIG_NAME} has a context of {context} tokens, the manifest says {facts.context_tokens}: context length cut")
    return problems + stop_problems(folder, config, facts.stop_ids)


def config_problems(config: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Keys that decide what the model computes and differ from the base's."""
    keys = sorted((set(config) | set(base)) - OWN_KEYS)
    return [
        f"{CONFIG_NAME}: {key} is {_told(config.get(key, 'absent'))}, the base has {_told(base.get(key, 'absent'))}"
        for key in keys
        if config.get(key, "absent") != base.get(key, "absent")
    ]


def stop_problems(folder: Path, config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> list[str]:
    """Stop tokens that the folder's files give and the manifest does not, or the other way round."""
    path = folder / GENERATION_NAME
    found = (read_json(path) if path.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    ids = tuple(found) if isinstance(found, list) else (found,)
    if set(ids) == set(stop_ids):
        return []
    return [f"stop ids are {list(ids)} in the folder and {list(stop_ids)} in the manifest: a server would not stop where the model does"]


def adapter_problems(adapter: Artifact, wanted: AdapterFacts | None) -> list[str]:
    """What the adapter's manifest says otherwise than its own file or than the spec; `wanted` is None where nobody says."""
    facts = adapter.manifest.model.adapter if adapter.manifest.model else None
    if facts is None:
        return ["its manifest holds no facts of an adapter"]
    problems = []
    if wanted is not None:
        problems += [
            f"{name} is {_told(getattr(facts, name))} in its manifest, the spec says {_told(getattr(wanted, name))}"
            for name in AdapterFacts.model_fields
            if _sorted(getattr(facts, name)) != _sorted(getattr(wanted, name))
        ]
    path = adapter.path / ADAPTER_CONFIG_NAME
    own = read_json(path) if path.is_file() else {}
    for key, value in (("r", facts.rank), ("lora_alpha", facts.alpha), ("use_rslora", facts.use_rslora), ("use_dora", facts.use_dora)):
        if key in own and own[key] != value:
            problems.append(f"{ADAPTER_CONFIG_NAME}: {key} is {own[key]}, its manifest says {value}: wrong alpha, rank or scaling")
    return problems


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple) else value


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "(none)"


def _told(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
