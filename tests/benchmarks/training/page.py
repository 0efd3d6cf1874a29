"""Writes the tables of docs/evidence/training.md from the results alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_table import header, row

from training.arms import ARMS, DENSE, DENSE_AS_LONG, DENSE_LONGER
from training.claims import (
    CHOICES,
    ENOUGH,
    OVER_TIME,
    PAPER,
    Comparison,
    Runs,
    Spread,
    difference,
    runs_of,
    spread_of,
    verdict,
    verdict_of_all,
)

BEGIN = "<!-- Written by `python tests/benchmarks/training --report`. -->"
END = "<!-- So far. -->"
_UNITS = {"loss": "", "load_cv": ": CV of load", "idle_experts": ": experts never chosen"}


def write_page(results: Mapping[str, Any], docs: Path) -> None:
    """Write the figures, and put the tables into the page."""
    from training.figures import draw

    draw(runs_of(results), docs / "training")
    page = docs / "training.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_tables(page: str, results: Mapping[str, Any]) -> str:
    """Return the page with the tables of these results between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    runs, shares = runs_of(results), results["scale"]["evaluations"][1:]
    parts = (_about(results, runs), _paper(runs), _choices(runs), _over_time(runs, shares))
    tables = ["\n".join(part) for part in (*parts, _arms(runs))]
    return "\n\n".join([f"{before}{BEGIN}", *tables, f"{END}{after}"])


def _about(results: Mapping[str, Any], runs: Runs) -> Iterator[str]:
    scale, text, dense, machine = (results[key] for key in ("scale", "text", "dense", "machine"))
    steps = scale["continued"] // (scale["context"] * scale["rows"])
    seeds = " or ".join(map(str, sorted({len(each) for each in runs.values()})))
    model, config = "SmolLM2-135M", scale["dense"]
    if config is not None:
        model = (
            f"qwen3, {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, "
            f"intermediate size {config['intermediate_size']}, vocabulary {config['vocab_size']}"
        )
    yield f"- commit {results['commit']}, {results['date']}"
    yield (
        f"- machine: {machine['device']}, threads: {machine['threads']}; Python "
        f"{machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}"
    )
    yield (
        f"- text: {text['package']}, {text['files']} files, {text['bytes'] / 1e6:.1f} MB, "
        f"{text['held_out_files']} of them held out; losses are measured on "
        f"{text['held_out_tokens']:,} tokens of those"
    )
    yield (
        f"- dense model: {model}; {dense['parameters']:,} parameters, {scale['pretraining']:,} "
        f"tokens of pretraining, loss {dense['loss']:.4f}"
    )
    yield (
        f"- training: {scale['continued']:,} tokens in {steps} steps; AdamW in float32; a cosine "
        f"from {scale['peak']:g} to a tenth of it; balancing loss of each layer × 0.01"
    )
    yield f"- {seeds} seeds, each for the conversion and the order of the data"


def _paper(runs: Runs) -> Iterator[str]:
    measured = "first against second"
    yield header("the paper's claim", measured, "first is lower by", "measured")
    for claim, comparisons in PAPER.items():
        found = [difference(runs, each) for each in comparisons]
        verdicts = [verdict(each) for each in found]
        together = f"**{verdict_of_all(verdicts)}**"
        for index, (comparison, spread) in enumerate(zip(comparisons, found, strict=True)):
            each = {"no": "no, higher"}.get(verdicts[index], verdicts[index])
            if len({*verdicts}) == 1:
                last = "" if index else together
            else:
                last = each if index else f"{together}: {each}"
            yield row("" if index else claim, _pair(comparison), _text(spread), last)


def _choices(runs: Runs) -> Iterator[str]:
    yield header("first", "second", "first is lower by", "lower")
    for each in CHOICES:
        spread = difference(runs, each)
        if spread is not None:
            said = {"yes": "first", "no": "second"}.get(verdict(spread), verdict(spread))
            yield row(each.first, each.second, _text(spread), said)


def _over_time(runs: Runs, shares: Sequence[float]) -> Iterator[str]:
    yield header("first is lower by, after", *(f"{share:.0%}" for share in shares))
    for each in OVER_TIME:
        found = (difference(runs, each, when) for when in range(1, len(shares) + 1))
        yield row(_pair(each), *map(_text, found))


def _arms(runs: Runs) -> Iterator[str]:
    losses = ("first loss", "last loss", "lower than dense by", "at equal FLOPs by")
    yield header("arm", "FLOPs", *losses, "load: CV", "never chosen", "split groups", "apart")
    dense_flops = next(iter(runs[DENSE].values()))["flops_per_token"]
    at_tokens, at_flops = dict[str, list[str]](), dict[str, list[str]]()
    for arm in (name for name in ARMS if name in runs):
        run, last = next(iter(runs[arm].values())), spread_of(runs, arm)
        error = "" if math.isnan(last.standard_error) else f" ± {last.standard_error:.4f}"
        lower, at_equal_flops = (
            difference(runs, Comparison(arm, other)) for other in (DENSE, DENSE_AS_LONG)
        )
        if ARMS[arm].recipe:
            at_tokens.setdefault(verdict(lower), []).append(arm)
            at_flops.setdefault(verdict(at_equal_flops), []).append(arm)
        yield row(
            arm,
            f"{run['flops_per_token'] / dense_flops:.2f} ×",
            f"{spread_of(runs, arm, when=0).mean:.4f}",
            f"{last.mean:.4f}{error}",
            "–" if arm == DENSE else _text(lower),
            "–" if arm in (DENSE, DENSE_LONGER) else _text(at_equal_flops),
            *_experts(runs, arm, run["curve"][-1]),
        )
    yield ""
    total = sum(map(len, at_flops.values()))
    for what, found in (("tokens", at_tokens), ("FLOPs", at_flops)):
        yield (
            f"At equal {what}, {len(found.get('yes', ()))} of {total} ways to convert and train "
            f"ended lower than continued dense training and {len(found.get('no', ()))} higher."
        )
    yield f"Not decided at equal FLOPs: {'; '.join(at_flops.get('not decided', ['none']))}."


def _experts(runs: Runs, arm: str, last: Mapping[str, Any]) -> Sequence[str]:
    if "load_cv" not in last:
        return ["–"] * 4
    grouped = ARMS[arm].granularity > 1 and ARMS[arm].convert.get("virtual_groups", True)
    cv, idle, split, apart = (
        spread_of(runs, arm, measure).mean
        for measure in ("load_cv", "idle_experts", "split_share", "apart")
    )
    whole = f"{100 * split:.3g} %" if grouped else "–"
    return [f"{cv:.2f}", f"{idle:.3g} of {last['experts']}", whole, f"{apart:.2g}"]


def _pair(comparison: Comparison) -> str:
    return f"{comparison.first} against {comparison.second}{_UNITS[comparison.measure]}"


def _text(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    margin = f" ± {spread.margin:.4f}" if len(spread.values) >= ENOUGH else ""
    return f"{spread.mean:.4f}{margin}"
