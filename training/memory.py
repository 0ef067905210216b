"""How much memory a worker will need, from the model's configuration and the packs that it will see; no torch.

Counted is what the code keeps: weights in their storage, one fp32 master value and gradient a trained parameter besides the copy that
computes, the optimizer's state, and what the hand-written and torch's own gradients save of each layer. The test holds it to 15% of what
a process was measured to use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from infra.model_sizes import head_size
from training.config import TrainConfig

PROGRAM_BYTES = 700 << 20  # Python with torch and transformers 480 MB before any model, kernels and threads 220 MB after some steps
# Of activations: what freed blocks of other sizes leave unused, over seven kinds of run on a CPU, where the allocator gives nothing back.
# Without adapters blocks as large as the embedding come and go beside small ones: 3.98 GB measured with AdamW, 3.45 with its 8-bit kind.
HEAP_SHARE = {"lora": 1.34, "full": 2.1}
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw": 8, "paged_adamw_8bit": 2, "lion": 4, "adafactor": 0, "sgd": 4}
STORED_BYTES = {"nf4": 0.516, "int8": 1.004}  # a weight with its block's or row's scale
WORDS = {"bf16": 2, "fp16": 2, "fp32": 4}
LOSS_CHUNK_BYTES = 64 << 20  # of logits at once, see CHUNK_BYTES in training/loss.py
STEP_BYTES_8BIT = 16 * (1 << 22)  # four fp32 copies of the piece that is stepped, see training/optimizer.py
SCORE_WORDS = 2  # score matrices alive at once, in fp32, while one layer goes backward


@dataclass(frozen=True)
class PackShape:
    """The largest pack of a run."""

    tokens: int
    """Places, the shared prefix once."""
    rows: int
    longest_row_tokens: int
    """Without the prefix."""
    prefix_tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker at its peak, by what they are for."""

    program: int
    weights: int
    trained: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    is_tied: bool

    @property
    def layer_weights(self) -> int:
        """Weights in the linear layers of one decoder layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def embedding_weights(self) -> int:
        """Weights of embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a model's config.json."""
    heads = int(config["num_attention_heads"])
    return ModelShape(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_size(config),
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
        is_tied=bool(config.get("tie_word_embeddings")),
    )


def estimate(model: ModelShape, train: TrainConfig, precision: str, num_trained: int, pack: PackShape) -> MemoryEstimate:
    """Peak of one worker. `num_trained` counts the whole model's trained parameters."""
    parallel, word = train.parallel, WORDS[precision]
    parts = parallel.pipeline * parallel.tensor * parallel.shard
    linear = model.layers * model.layer_weights * STORED_BYTES.get(train.base_quantization, word)
    trained_word = 8 + (0 if precision == "fp32" else word if train.method == "lora" else 0)  # fp32 computes with the master itself
    if train.base_quantization != "none":
        linear += model.layers * model.layer_weights * word  # the 16-bit file stays mapped
    weights = 0 if train.method == "full" and precision == "fp32" else linear + model.embedding_weights * word
    state = num_trained * OPTIMIZER_BYTES[train.optimizer] // parts
    return MemoryEstimate(
        program=PROGRAM_BYTES,
        weights=int(weights / parts),
        trained=num_trained * trained_word // parts,
        optimizer=state + (min(16 * num_trained // parts, STEP_BYTES_8BIT) if "8bit" in train.optimizer else 0),
        activations=int(HEAP_SHARE[train.method] * activation_bytes(model, train, word, pack)),
    )


def activation_bytes(model: ModelShape, train: TrainConfig, word: int, pack: PackShape) -> int:
    """What one pack's forward pass leaves for the backward pass, and the most that is needed beside it."""
    tensor = train.parallel.tensor
    padded = pack.rows * pack.longest_row_tokens
    scores = model.heads // tensor * padded * (pack.longest_row_tokens + pack.prefix_tokens)
    per_token = 4 * model.hidden + (4 * model.intermediate + model.heads * model.head_dim) // tensor
    seen = pack.rows * (pack.longest_row_tokens + pack.prefix_tokens)
    heads = (model.heads * padded + 2 * model.kv_heads * seen) * model.head_dim // tensor
    a_layer = word * (per_token * pack.tokens + heads + scores)
    if train.method == "lora":
        a_layer += word * train.lora.rank * len(train.lora.target_modules) * pack.tokens
    layers = -(-model.layers // train.parallel.pipeline)
    kept = layers * a_layer if not train.gradient_checkpointing else layers * word * model.hidden * pack.tokens + a_layer
    beside = SCORE_WORDS * 4 * scores + word * (3 * model.intermediate // tensor + 4 * model.hidden) * pack.tokens
    logits = min(word * pack.supervised_tokens * model.vocabulary, LOSS_CHUNK_BYTES)
    loss = logits + word * pack.supervised_tokens * model.hidden
    if train.method == "full":
        beside = max(beside, (4 + 2 * word) * model.embedding_weights)  # gradients of head, in fp32 and rounded, and of embedding
    in_flight = min(train.parallel.pipeline, 4)
    return kept * in_flight + max(beside, loss)
