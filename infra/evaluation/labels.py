"""Answers as labels of a classification: macro-F1 and the confusion matrix.

The labels are those that some row expects. Any other answer counts against the label it missed, and is no label of its own: else a model
that writes a hundred kinds of nonsense would be punished a hundred times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

OTHER_LABEL = "(other)"
MAX_LABELS_SHOWN = 30

Pair = tuple[str, str]


def label_pair(answer: str, expected: str) -> Pair:
    """Expected and answered label, white space around them ignored."""
    return expected.strip(), answer.strip()


def macro_f1(pairs: Sequence[Pair]) -> float:
    """The mean F1 score of the labels that these rows expect, each label counted once however many rows it has.

    Source: C. D. Manning, P. Raghavan, H. Schütze, Introduction to Information Retrieval (2008), section 13.6 (macroaveraging).
    """
    wanted, given, right = Counter(pair[0] for pair in pairs), Counter(pair[1] for pair in pairs), Counter[str]()
    right.update(one for one, other in pairs if one == other)
    return sum(2 * right[label] / (wanted[label] + given[label]) for label in wanted) / len(wanted)


def confusion(pairs: Sequence[Pair]) -> dict[str, Any]:
    """`labels`, the most frequent first, and `counts`: a row an expected label, a column an answered one; rarer ones are `(other)`."""
    shown = [label for label, _ in Counter(sorted(pair[0] for pair in pairs)).most_common(MAX_LABELS_SHOWN)]
    known = set(shown)
    cells = Counter(tuple(label if label in known else OTHER_LABEL for label in pair) for pair in pairs)
    labels = [*shown, *([OTHER_LABEL] if any(OTHER_LABEL in cell for cell in cells) else [])]
    return {"labels": labels, "counts": [[cells[one, other] for other in labels] for one in labels]}
