"""Names, labels, quantities and the like, as Kubernetes takes them: what the schema lets through, an API server does not refuse."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

_WORD = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_QUALIFIED = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
NAME_PATTERN = f"^{_WORD}$"
DOTTED_PATTERN = rf"^{_WORD}(\.{_WORD})*$"
OPTIONAL_NAME_PATTERN = rf"^({_WORD}(\.{_WORD})*)?$"
HOST_PATTERN = rf"^(\*\.)?{_WORD}(\.{_WORD})*$"
OPTIONAL_HOST_PATTERN = rf"^((\*\.)?{_WORD}(\.{_WORD})*)?$"
KEY_PATTERN = rf"^({_WORD}(\.{_WORD})*/)?{_QUALIFIED}$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
QUANTITY_PATTERN = r"^([0-9]+(\.[0-9]+)?|\.[0-9]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?$"
OURS_PATTERN = r"^(app\.kubernetes\.io|slipway\.dev|kueue\.x-k8s\.io|ray\.io)/"
_FACTORS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", start=1)
}


@dataclass(frozen=True)
class Keys:
    """Keys of a mapping, for its JSON schema: none but those that its key type takes, and none that is `refused`."""

    refused: str | None = None
    """Pattern of keys that the templates set themselves."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The mapping's own schema, closed."""
        written = handler(schema)
        if self.refused is not None:
            written["patternProperties"] = {**written["patternProperties"], self.refused: False}
        return {**written, "additionalProperties": False}


def _none_of_ours(given: dict[str, str]) -> dict[str, str]:
    for key in given:
        if re.match(OURS_PATTERN, key):
            raise ValueError(f"{key!r} is set by the chart itself. Take another key, or `nameOverride`, `deployment`, `managedBy`.")
    return given


Key = Annotated[str, Field(max_length=317, pattern=KEY_PATTERN)]
LabelValue = Annotated[str, Field(max_length=63, pattern=LABEL_VALUE_PATTERN)]
Labels = Annotated[dict[Key, LabelValue], Keys()]
"""Labels to select by."""
MoreLabels = Annotated[dict[Key, LabelValue], AfterValidator(_none_of_ours), Keys(OURS_PATTERN)]
"""Labels beside those that the templates set."""
Annotations = Annotated[dict[Key, str], AfterValidator(_none_of_ours), Keys(OURS_PATTERN)]
"""Annotations beside those that the templates set."""
Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN)] | Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)]
Quantities = Annotated[dict[Key, Quantity], Keys()]
Name = Annotated[str, Field(max_length=63, pattern=NAME_PATTERN)]
DottedName = Annotated[str, Field(max_length=253, pattern=DOTTED_PATTERN)]
OptionalName = Annotated[str, Field(max_length=253, pattern=OPTIONAL_NAME_PATTERN)]
HostName = Annotated[str, Field(max_length=253, pattern=HOST_PATTERN)]
SecretKeyName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]


def amount(quantity: str | int | float) -> float:
    """A quantity as a number in its base unit: cores, or bytes.

    Raises ValueError on text that is no quantity.
    """
    if not isinstance(quantity, str):
        return float(quantity)
    found = re.fullmatch(r"([0-9.]+)(m|[kMGTPE]|[KMGTPE]i|)", quantity)
    return float(found[1]) * _FACTORS[found[2]] if found else float(quantity)
