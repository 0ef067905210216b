"""What an answer may hold beside text: calls of tools, log-probabilities, several choices; and what a grammar may ask."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.engines.base import Capabilities
from serving.engines.scripted import LOGPROB
from serving.grammars import json_grammar, regex_grammar
from serving.tool_calls import ToolCalls
from tests.unit.test_serving_api import CHAT, COMPLETION, USER, byte_codec, events, make_api, request, scripted

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("lamp", "door")]
BARE = '{"name":"lamp","arguments":{"area":"Küche"}}'
DOOR = '<tool_call>{"name":"door","arguments":"{}"}</tool_call>'
TAGGED = f'ok <tool_call>\n{{"name": "lamp", "arguments": {{"on": true}}}}\n</tool_call>{DOOR} done'
NO_CALLS = [
    "no call here", '{"name":"other","arguments":{}}', '{"name":"lamp","arguments":[1]}', '{"name":"lamp"', '{"a":1} then {"b":2}',
    "<tool_call>not json</tool_call>", "<tool_call>{", "a <tool", '{"name":"lamp","arguments":{},"more":1}',
    "{x}", " \n ", "{" * 3000 + "}",
]  # fmt: skip


def read(text: str, size: int, is_single: bool = False) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer that comes in parts of `size` characters."""
    reader = ToolCalls(frozenset({"lamp", "door"}), is_single)
    shown, calls = "", []
    for start in range(0, len(text), size):
        more, found = reader.feed(text[start : start + size])
        shown += more
        calls += [(call.name, json.loads(call.arguments)) for call in found]
    return shown + reader.flush(), calls


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tool_calls_are_found_wherever_the_text_is_cut(size: int) -> None:
    assert read(BARE, size) == ("", [("lamp", {"area": "Küche"})])
    assert read(f"\n{BARE}\n{BARE}", size) == ("", [("lamp", {"area": "Küche"})] * 2)
    assert read(TAGGED, size) == ("ok  done", [("lamp", {"on": True}), ("door", {})])
    assert read(f"{BARE}{BARE}", size, is_single=True) == (BARE, [("lamp", {"area": "Küche"})])


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("text", NO_CALLS)
def test_tool_calls_text_that_is_no_call_stays_as_it_was(text: str, size: int) -> None:
    assert read(text, size) == (text, [])


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_chat_answers_with_tool_calls_whole_and_streamed(chunk_tokens: int) -> None:
    body = {"model": "toy", "messages": USER, "tools": TOOLS}
    choice = request(make_api(scripted(BARE, chunk_tokens=chunk_tokens)), "POST", CHAT, json=body).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "lamp", "arguments": '{"area":"Küche"}'})
    streamed = events(request(make_api(scripted(TAGGED, chunk_tokens=chunk_tokens)), "POST", CHAT, json={**body, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "lamp"), (1, "door")]
    assert len({call["id"] for call in calls}) == 2
    assert "".join(delta["content"] for delta in deltas) == "ok  done"
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_chat_without_tools_or_with_none_leaves_a_call_as_text() -> None:
    for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = request(make_api(scripted(BARE)), "POST", CHAT, json={"model": "toy", "messages": USER, **extra}).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (BARE, "stop")


def test_forced_call_reaches_the_engine_as_a_grammar_of_that_tool() -> None:
    engine = scripted(BARE)
    choice = {"type": "function", "function": {"name": "door"}}
    request(make_api(engine), "POST", CHAT, json={"model": "toy", "messages": USER, "tools": TOOLS, "tool_choice": choice})
    grammar = engine.seen[0][1].grammar
    assert grammar is not None
    assert json.loads(grammar.text)["properties"]["name"] == {"const": "door"}


LACKING: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
    ({"min_p": 0.1}, "min_p"),
]


@pytest.mark.parametrize(("extra", "param"), LACKING)
def test_parameter_that_the_engine_lacks_gives_400_naming_both(extra: dict[str, Any], param: str) -> None:
    engine = scripted("x", capabilities=Capabilities("plain", max_top_logprobs=1, takes_min_p=False))
    response = request(make_api(engine), "POST", CHAT, json={"model": "toy", "messages": USER, **extra})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "unsupported_parameter")
    assert "'plain'" in error["message"]
    assert engine.seen == []


def test_logprobs_have_the_bytes_of_each_token() -> None:
    body = {"model": "toy", "messages": USER, "logprobs": True, "top_logprobs": 2}
    content = request(make_api(scripted("a€")), "POST", CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "a€"
    assert [token["logprob"] for token in content] == [LOGPROB] * 4
    assert [len(token["top_logprobs"]) for token in content] == [2] * 4
    body = {"model": "toy", "prompt": "x", "logprobs": 1, "stream": True}
    parts = [chunk["choices"][0]["logprobs"] for chunk in events(request(make_api(scripted("abc")), "POST", COMPLETION, json=body))]
    told = [part for part in parts if part]
    assert [token for part in told for token in part["tokens"]] == ["a", "b", "c"]
    assert [offset for part in told for offset in part["text_offset"]] == [0, 1, 2]


def test_several_choices_are_numbered_counted_and_seeded_apart() -> None:
    engine = scripted("xyz")
    body = {"model": "toy", "prompt": "x", "n": 3, "seed": 5}
    answer = request(make_api(engine), "POST", COMPLETION, json=body).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "xyz"), (1, "xyz"), (2, "xyz")]
    assert answer["usage"]["completion_tokens"] == 9
    assert sorted(sampling.seed for _, sampling in engine.seen if sampling.seed) == [5, 6, 7]
    streamed = events(request(make_api(engine), "POST", CHAT, json={"model": "toy", "messages": USER, "n": 2, "stream": True}))
    roles = [chunk["choices"][0]["index"] for chunk in streamed if "role" in chunk["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1]


def test_failing_choice_ends_the_others() -> None:
    engine = scripted("abc", fails_after=1)
    response = request(make_api(engine), "POST", COMPLETION, json={"model": "toy", "prompt": "x", "n": 3})
    assert response.status_code == 503
    assert engine.figures.num_running == 0


def test_tokenize_and_detokenize_are_each_others_inverse() -> None:
    api = make_api(scripted("x"))
    told = request(api, "POST", "/tokenize", json={"model": "toy", "prompt": "a€", "return_token_strs": True}).json()
    assert told == {"count": 4, "max_model_len": 5000, "tokens": byte_codec().encode_text("a€"), "token_strs": ["a", "â", "Ĥ", "¬"]}
    assert request(api, "POST", "/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "a€"}
    assert request(api, "POST", "/tokenize", json={"messages": USER}).json()["count"] == len("user:hi\n")


GOOD_REGEXES = ["[ab]{3}", "(on|off) \\d{2,4}", "^a$", "(?:x|y)+z?", "[a-z.]+@x\\.com", "é*", "\\$"]
BAD_REGEXES = ["", "[ab", "(?=a)b", "(a)\\1", "a|", "()", "a{2}?", "a{300}", "(a{20}){20}", "[é]", "\\x41", "\\b", "x" * 600, "a^b", "[]a]"]
BAD_SCHEMAS: list[Any] = [
    {"type": "nope"}, {"minimum": 1}, {"maxLength": 3}, {"$ref": "#/nope"}, {"$ref": "#/$defs/a"}, {"enum": []}, {"required": ["a"]}, False,
    {"type": "array", "minItems": 1}, {"items": {}, "minItems": 2, "maxItems": 1}, {"properties": {"a\\": {}}}, {"pattern": '"'},
    {"pattern": "[^a]"}, {"pattern": "."}, {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, {"oneOf": [{}]},
    {"description": "x" * 20_000}, {"properties": {"a": {"$defs": {"b": {}}}}},
]  # fmt: skip


@pytest.mark.parametrize("pattern", GOOD_REGEXES)
def test_regex_in_the_subset_is_taken(pattern: str) -> None:
    assert regex_grammar(pattern).kind == "regex"


@pytest.mark.parametrize("pattern", BAD_REGEXES)
def test_regex_outside_the_subset_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        regex_grammar(pattern)


def test_json_schema_in_the_subset_is_taken_as_it_is() -> None:
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["next"]}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}, "title": "a list"}
    assert json.loads(json_grammar(schema).text) == schema


@pytest.mark.parametrize("schema", BAD_SCHEMAS)
def test_json_schema_outside_the_subset_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match=r"JSON schema|regular expression"):
        json_grammar(schema)


def test_openapi_document_holds_every_route_and_resolves() -> None:
    document = request(make_api(scripted("x")), "GET", "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/embeddings", "/v1/models/{name}"} <= set(
        document["paths"]
    )
    schemas = document["components"]["schemas"]
    names = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert names <= set(schemas)
    assert {"min_p", "structured_outputs", "tool_choice", "top_logprobs"} <= set(schemas["ChatRequest"]["properties"])
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["toy"]
