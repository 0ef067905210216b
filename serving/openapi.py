"""The OpenAPI document, made of the very models that check the requests."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from serving.openai_messages import Schema
from serving.openai_schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[Schema]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(routes: list[tuple[str, str]], model_names: list[str]) -> dict[str, Any]:
    """The document of `routes`, given as method and path, on a server of a model of these names."""
    _, schemas = models_json_schema([(model, "validation") for model in BODIES.values()], ref_template="#/components/schemas/{model}")
    for body in BODIES.values():
        schemas["$defs"][body.__name__]["properties"]["model"] = {"type": "string", "enum": model_names}
    paths: dict[str, Any] = {}
    for method, path in routes:
        paths.setdefault(path.replace(":path}", "}"), {})[method.lower()] = _operation(method, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Slipway", "version": "1"},
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": ERROR}},
    }


def _operation(method: str, path: str) -> dict[str, Any]:
    failed = {"description": "What is wrong, and with which field.", "content": _json({"$ref": "#/components/schemas/Error"})}
    operation: dict[str, Any] = {"responses": {"200": {"description": "The answer."}, "4XX": failed, "5XX": failed}}
    if "{name:path}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    if method == "POST":
        schema = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"} if path in BODIES else {"type": "object"}
        operation["requestBody"] = {"required": True, "content": _json(schema)}
    return operation


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
