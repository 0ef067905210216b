"""Overlap of free texts by the libraries that papers cite: ROUGE-L by `rouge-score`, BLEU by `sacrebleu`; imported when first used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_WORD = re.compile(r"\w+")

BLEU_ORDER = 4


class _Words:
    """Words of any script in lower case; the library's own tokenizer keeps a-z and 0-9 alone, which leaves most languages nothing."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return _WORD.findall(text.casefold())


def rouge_l(answer: str, expected: str) -> float:
    """F-measure of the longest common subsequence of words.

    Source: C.-Y. Lin, ROUGE: a package for automatic evaluation of summaries, ACL workshop Text Summarization Branches Out (2004), 74-81.
    """
    return float(_rouge().score(expected, answer)["rougeL"].fmeasure)


def bleu_counts(answer: str, expected: str) -> tuple[int, ...]:
    """What one row adds to the corpus BLEU: n-grams matched and made of each order, and the lengths of answer and expected text."""
    found = _bleu().corpus_score([answer], [[expected]])
    return (*found.counts, *found.totals, found.sys_len, found.ref_len)


def bleu(counts: Sequence[Sequence[int]]) -> float:
    """Corpus BLEU from its rows' counts, between 0 and 1 (sacrebleu's own figure is between 0 and 100).

    Source: K. Papineni et al., BLEU: a method for automatic evaluation of machine translation, ACL 2002, 311-318; M. Post, A call for
    clarity in reporting BLEU scores, WMT 2018, 186-191.
    """
    sums = [sum(column) for column in zip(*counts, strict=True)]
    correct, total, (answered, wanted) = sums[:BLEU_ORDER], sums[BLEU_ORDER : 2 * BLEU_ORDER], sums[2 * BLEU_ORDER :]
    return float(_bleu().compute_bleu(correct, total, answered, wanted, smooth_method="exp").score) / 100


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=BLEU_ORDER)
