"""The part of docs/training.md that says what was measured: written from the results alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    ends,
    runs_of,
    verdict,
    verdict_of_all,
)

PAGE = "training.md"
BEGIN = "<!-- Written by `python tests/benchmarks/training --report`. -->"
END = "<!-- So far. -->"
_UNITS = {"loss": "", "load_cv": " CV of load", "idle_experts": " experts never chosen"}
_WORDS = {"yes": "first", "no": "second"}
_WHETHER = {"yes": "yes", "no": "no, higher"}


def write_page(results: Mapping[str, Any], docs: Path) -> None:
    """Write the figures, and put the tables into the page."""
    from training.figures import draw

    draw(runs_of(results), docs / "training")
    page = docs / PAGE
    page.write_text(with_tables(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_tables(page: str, results: Mapping[str, Any]) -> str:
    """Return the page with the tables of these results between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}"


def tables(results: Mapping[str, Any]) -> str:
    """Return what was run, what it says of the paper's claims and of choices, and every arm."""
    runs = runs_of(results)
    shares = results["scale"]["evaluations"]
    parts = (
        _about(results, runs),
        _paper(runs),
        _choices(runs),
        _over_time(runs, shares),
        _arms(runs),
    )
    return "\n\n".join("\n".join(part) for part in parts)


def _about(results: Mapping[str, Any], runs: Runs) -> Iterator[str]:
    scale, text, dense = results["scale"], results["text"], results["dense"]
    machine, steps = results["machine"], scale["continued"] // (scale["context"] * scale["rows"])
    seeds = sorted({len(each) for each in runs.values()})
    yield f"- commit {results['commit']}, {results['date']}"
    yield (
        f"- machine: {machine['device']}, threads: {machine['threads']}; Python "
        f"{machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}"
    )
    yield (
        f"- text: {text['package']}, {text['files']} files, {text['bytes'] / 1e6:.1f} MB, "
        f"{text['held_out_files']} of them held out; the loss is that of "
        f"{text['held_out_tokens']:,} tokens of these"
    )
    config = scale["dense"]
    model = (
        "SmolLM2-135M"
        if config is None
        else f"qwen3, {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, "
        f"intermediate size {config['intermediate_size']}, vocabulary {config['vocab_size']}"
    )
    yield (
        f"- dense model: {model}; {dense['parameters']:,} parameters, {scale['pretraining']:,} "
        f"tokens of pretraining, loss {dense['loss']:.4f}"
    )
    yield (
        f"- then {scale['continued']:,} tokens in {steps} steps, AdamW, peak {scale['peak']:g} and "
        "a cosine to a tenth of it; a balancing loss of 0.01 for each layer by itself; float32"
    )
    yield f"- seeds: {' or '.join(map(str, seeds))}, of the conversion and of the order of the data"


def _paper(runs: Runs) -> Iterator[str]:
    yield "| the paper's claim | measured: first against second | first is lower by | here |"
    yield "|---|---|---|---|"
    for claim in PAPER:
        found = [difference(runs, each) for each in claim.comparisons]
        verdicts = [verdict(each) for each in found]
        alike = len({*verdicts}) == 1
        for row, (comparison, spread) in enumerate(zip(claim.comparisons, found, strict=True)):
            each = _WHETHER.get(verdicts[row], verdicts[row])
            said = "" if row else f"**{verdict_of_all(verdicts)}**"
            last = said if alike else each if row else f"{said}: {each}"
            words = "" if row else claim.text
            yield f"| {words} | {_pair(comparison)} | {_text(spread)} | {last} |"


def _choices(runs: Runs) -> Iterator[str]:
    yield "| first | second | first is lower by | trains better |"
    yield "|---|---|---|---|"
    for each in CHOICES:
        spread = difference(runs, each)
        if spread is not None:
            said = _WORDS.get(verdict(spread), verdict(spread))
            yield f"| {each.first} | {each.second} | {_text(spread)} | {said} |"


def _over_time(runs: Runs, shares: Sequence[float]) -> Iterator[str]:
    yield f"| first is lower by, after | {' | '.join(f'{share:.0%}' for share in shares[1:])} |"
    yield f"|---{'|---' * len(shares[1:])}|"
    for each in OVER_TIME:
        found = [difference(runs, each, when) for when in range(1, len(shares))]
        yield f"| {' | '.join([_pair(each), *map(_text, found)])} |"


def _arms(runs: Runs) -> Iterator[str]:
    yield (
        "| arm | FLOPs | loss at first | at the end | lower than dense by | at equal FLOPs by | "
        "load: CV | never chosen | split groups | apart |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    flops = next(iter(runs[DENSE].values()))["flops_per_token"]
    defining = DENSE, DENSE_LONGER
    for arm in (name for name in ARMS if name in runs):
        run = next(iter(runs[arm].values()))
        first = Spread(tuple(each["curve"][0]["loss"] for each in runs[arm].values()))
        last = run["curve"][-1]
        cells = [
            arm,
            f"{run['flops_per_token'] / flops:.2f} ×",
            f"{first.mean:.4f}",
            _mean(ends(runs, arm)),
            "–" if arm == DENSE else _text(difference(runs, Comparison(arm, DENSE))),
            _text(None if arm in defining else difference(runs, Comparison(arm, DENSE_AS_LONG))),
            *_experts(runs, arm, last),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield _equal_flops({arm: runs[arm] for arm in ARMS if arm in runs})


def _equal_flops(runs: Runs) -> str:
    """Say of all recipes together what came of as many FLOPs of dense training."""
    said: dict[str, list[str]] = {}
    for arm in (name for name in runs if ARMS[name].recipe):
        found = verdict(difference(runs, Comparison(arm, DENSE_AS_LONG)))
        said.setdefault(found, []).append(arm)
    lower, higher, hints = (len(said.get(found, ())) for found in ("yes", "no", "a hint"))
    return (
        f"At equal FLOPs {lower} of {sum(map(len, said.values()))} ways to convert and train ended "
        f"lower than the dense model and {higher} higher{f', {hints} are hints' if hints else ''}. "
        f"Not decided: {'; '.join(said.get('not decided', ('none',)))}."
    )


def _experts(runs: Runs, arm: str, last: Mapping[str, Any]) -> Sequence[str]:
    if "load_cv" not in last:
        return ["–"] * 4
    grouped = ARMS[arm].granularity > 1 and ARMS[arm].convert.get("virtual_groups", True)
    return [
        f"{ends(runs, arm, 'load_cv').mean:.2f}",
        f"{ends(runs, arm, 'idle_experts').mean:.3g} of {last['experts']}",
        f"{100 * ends(runs, arm, 'split_share').mean:.3g} %" if grouped else "–",
        f"{ends(runs, arm, 'apart').mean:.2g}",
    ]


def _pair(comparison: Comparison) -> str:
    unit = _UNITS[comparison.measure]
    return f"{comparison.first} against {comparison.second}{':' * bool(unit)}{unit}"


def _mean(spread: Spread) -> str:
    error = "" if math.isnan(spread.standard_error) else f" ± {spread.standard_error:.4f}"
    return f"{spread.mean:.4f}{error}"


def _text(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    if len(spread.values) < ENOUGH:
        return f"{spread.mean:.4f}"
    return f"{spread.mean:.4f} ± {spread.margin:.4f}"
