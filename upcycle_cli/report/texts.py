"""What was measured token by token: how far both models' predictions are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from upcycle_cli.core.text import counted, printable
from upcycle_cli.report.figures import draw_histogram
from upcycle_cli.report.page import Figure, MarkedText, Section, Table, Token, scientific
from upcycle_cli.verification.result import Continuation, TextMeasure

_LEVELS = (1e-8, 1e-4, 1e-2, 1e-1)
"""From these KL on a token is marked, and more strongly."""
_MOST_TOKENS = 16_384
_FURTHEST = 20


def texts_section(
    texts: Sequence[TextMeasure], continuation: Continuation | None = None
) -> Section | None:
    """Return the texts with the KL on each token, None where there is none."""
    values = [kl for text in texts for kl in text.kl if kl is not None]
    if not values:
        return None
    ordered = sorted(values)
    marks = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in
             (("median", 0.5), ("90 %", 0.9), ("99 %", 0.99))}  # fmt: skip
    marks |= {"largest": ordered[-1]}
    told = ", ".join(f"{name} {value:.3g}" for name, value in marks.items())
    infinite = sum(kl is None for text in texts for kl in text.kl)
    histogram = Figure(
        svg=draw_histogram("kl", values, unit="KL in nats", counted="tokens"),
        title="Distribution of KL",
        description=f"Over {counted(len(values), 'token')} of text: {told}."
        + (f" At {counted(infinite, 'token')} it is not finite." if infinite else ""),
    )
    words = (
        "KL(dense ‖ MoE) says how far apart both models' predictions of the next token are: 0 for "
        "the same, and below 1e-8 nothing but the rounding of arithmetic."
    )
    return Section(
        key="kl",
        title="Predictions, token by token",
        words=[words],
        figures=[histogram],
        tables=[_furthest(texts), *_continued(continuation)],
        legend=_legend(),
        texts=list(_marked(texts)),
    )


def _continued(continuation: Continuation | None) -> Iterator[Table]:
    if continuation is None:
        return
    rows = {"text": continuation.text, "dense": continuation.dense, "MoE": continuation.moe}
    yield Table(
        caption="How each model goes on after a text, taking the most probable token each time",
        columns=("what", "tokens"),
        rows=[(name, printable(words)) for name, words in rows.items()],
        folded="How each model goes on",
    )


def _furthest(texts: Sequence[TextMeasure]) -> Table:
    found = [
        (math.inf if kl is None else kl, number, place)
        for number, text in enumerate(texts)
        for place, kl in enumerate(text.kl)
    ]
    found.sort(key=lambda item: -item[0])
    rows = []
    for kl, which, place in found[:_FURTHEST]:
        tokens = texts[which].tokens
        before = "".join(tokens[max(0, place - 6) : place])
        rows.append(
            (
                scientific(kl),
                printable(f"{before}[{tokens[place]}]"),
                f"{which + 1}",
                f"{place + 1}",
            )
        )
    return Table(
        caption="Where the predictions are furthest apart: after the token in brackets",
        columns=("KL", "text", "of text", "token"),
        rows=rows,
        folded=f"The {counted(len(rows), 'token')} after which predictions are furthest apart",
    )


def _level(kl: float | None) -> int:
    return len(_LEVELS) if kl is None else sum(kl >= level for level in _LEVELS)


def _legend() -> list[tuple[int, str]]:
    ends = [*_LEVELS[1:], None]
    marked = [
        (i + 1, f"{low:g} or more" if high is None else f"{low:g} to {high:g}")
        for i, (low, high) in enumerate(zip(_LEVELS, ends, strict=True))
    ]
    return [(0, f"KL below {_LEVELS[0]:g}"), *marked]


def _marked(texts: Sequence[TextMeasure]) -> Iterator[MarkedText]:
    left = _MOST_TOKENS
    for index, text in enumerate(texts):
        tokens = [
            Token(text=_token(word), title=f"KL {scientific(kl)}", level=_level(kl))
            for word, kl in islice(zip(text.tokens, text.kl, strict=False), left)
        ]
        left -= len(tokens)
        if tokens:
            finite = [kl for kl in text.kl if kl is not None]
            most = f", KL at most {max(finite):.3g}" if finite else ""
            cut = f"; the first {len(tokens):,} are shown" if len(tokens) < len(text.tokens) else ""
            marked = sum(token.level > 0 for token in tokens)
            words = f"{counted(len(text.tokens), 'token')}{most}; {marked or 'none'} marked{cut}."
            yield MarkedText(title=f"Text {index + 1}", words=words, tokens=tokens)


def _token(word: str) -> str:
    return "↵\n".join(map(printable, word.split("\n")))
