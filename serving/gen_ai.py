"""What a span says of a generation, by OpenTelemetry's conventions for generative AI; stop strings, a client's text, are left out."""

from __future__ import annotations

from collections.abc import Mapping

from serving.choice import ChoiceReason, Order
from serving.openai_format import Endpoint
from serving.tracing import Value

PROVIDER = "slipway"
OPERATIONS: dict[Endpoint, str] = {"chat": "chat", "completion": "text_completion"}


def asked(endpoint: Endpoint, model_name: str, order: Order, is_stream: bool) -> dict[str, Value]:
    """Attributes of a request that was found good."""
    sampling = order.sampling
    attributes: dict[str, Value | None] = {
        "gen_ai.operation.name": OPERATIONS[endpoint],
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model_name,
        "gen_ai.request.stream": is_stream,
        "gen_ai.request.choice.count": order.num_choices,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.usage.input_tokens": len(order.prompt_ids),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def answered(num_made: int, reasons: Mapping[int, ChoiceReason]) -> dict[str, Value]:
    """Attributes of what was made; `reasons` by the number of the choice, those that have ended."""
    ended = {"gen_ai.response.finish_reasons": [reasons[index] for index in sorted(reasons)]} if reasons else {}
    return {"gen_ai.usage.output_tokens": num_made, **ended}
