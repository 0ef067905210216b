"""Label and field selectors of a list or a watch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.cluster.faults import bad_request

IN = re.compile(r"(?P<key>[^\s!=,()]+)\s+(?P<word>in|notin)\s+\((?P<values>[^)]*)\)")
PLAIN = re.compile(r"(?P<absent>!?)\s*(?P<key>[^\s!=,()]+)\s*(?:(?P<sign>==|!=|=)\s*(?P<value>[^\s!=,()]*))?")
Test = Callable[[dict[str, Any]], bool]


def by_labels(text: str) -> Test:
    """Whether an object has the labels: `a=b`, `a!=b`, `a in (b,c)`, `a notin (b)`, `a`, `!a`, with commas between. Raises Fault."""
    tests = [_label_test(part) for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    return lambda item: all(test(item["metadata"].get("labels") or {}) for test in tests)


def _label_test(part: str) -> Test:
    if found := IN.fullmatch(part.strip()):
        key, values, is_in = found["key"], {value.strip() for value in found["values"].split(",")}, found["word"] == "in"
        return lambda labels: (labels.get(key) in values) == is_in
    found = PLAIN.fullmatch(part.strip())
    if not found or (found["absent"] and found["sign"]):
        raise bad_request(f"unable to parse requirement: {part!r}")
    key, sign, value = found["key"], found["sign"], found["value"]
    if not sign:
        is_there = not found["absent"]
        return lambda labels: (key in labels) == is_there
    return lambda labels: (labels.get(key) == value) == (sign != "!=")


def name_in(text: str) -> str:
    """The one name that a field selector leaves, empty where it leaves several."""
    found = [PLAIN.fullmatch(part.strip()) for part in text.split(",")]
    return next((each["value"] for each in found if each and each["key"] == "metadata.name" and each["sign"] in ("=", "==")), "")


def by_fields(text: str) -> Test:
    """Whether an object has the field values: of `metadata.name` and `metadata.namespace`, as every kind knows them, and a pod's few."""
    tests = [_field_test(part) for part in text.split(",") if part.strip()]
    return lambda item: all(test(item) for test in tests)


def _field_test(part: str) -> Test:
    found = PLAIN.fullmatch(part.strip())
    known = ("metadata.name", "metadata.namespace", "status.phase", "spec.nodeName", "involvedObject.name", "involvedObject.uid", "type")
    if not found or not found["sign"] or found["key"] not in known:
        raise bad_request(f'field label not supported: "{part}"')
    path, value, is_equal = found["key"].split("."), found["value"], found["sign"] != "!="

    def test(item: Any) -> bool:
        for key in path:
            item = (item or {}).get(key)
        return bool((item == value) == is_equal)

    return test
