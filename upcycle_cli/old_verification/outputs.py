"""Outputs: do both models, run by transformers' own code, predict the same next tokens?

Both run in float32 on the same text, a layer at a time and with their weights left on disk, the
dense model as it was published and once more with its weights rounded to the MoE's dtypes, which
tells the price of the dtype from that of the conversion. The difference is held to what the MoE
owes: nothing beyond arithmetic, or an error of the order of the router's logits. Where it owes
nothing, the difference is measured, and that is not a pass.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.old_verification.distributions import Comparison
from upcycle_cli.old_verification.factors import is_power_of_two, recover_factors
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.pictures import picture_metrics
from upcycle_cli.old_verification.prompts import Prompt, TextOptions, make_prompt
from upcycle_cli.old_verification.recipes import APPROXIMATE_LOGIT_STD
from upcycle_cli.old_verification.running import moe_model
from upcycle_cli.old_verification.sidebyside import Found, ending_of, run_side_by_side
from upcycle_cli.run.layerwise import started
from upcycle_cli.run.models import TransformersError, transformers_says
from upcycle_cli.verification.result import CheckResult, Findings, Status, TextMeasure

NAME = "outputs"
_EXACT_KL = 1e-8
_ROUNDED_KL = {"BF16": 1e-3, "F16": 1e-4, "F32": 1e-8}
_EXACT_TOP1 = 0.999
_MOST_ROUNDING_KL = 1e-2
_MOST_SPLIT = 1e-2
_MOST_SPLIT_EXACT = 1e-3
_FLOAT16_MAX = 65504.0


def check_outputs(
    facts: Facts,
    options: TextOptions,
    objection: str | None,
    by_header: Sequence[str],
    *,
    copied: Collection[int] = (),
    watch: Watch | None = None,
) -> CheckResult:
    """Compare the predictions of both models; `objection` says why nothing is promised, if so.

    `by_header` is what headers show to be wrong: then there is no model to run. `copied` are the
    layers whose experts are known to be copies of as many as there are shards. Raises UpcycleError
    when the dense model cannot run, and for options that no model can follow.
    """
    findings, note = Findings(), "The outputs could not be compared."
    for entry in facts.moe.tensors.values():
        if entry.dtype not in TORCH_DTYPES:
            findings.add(f"{entry.name} is {entry.dtype}, which no weight is")
    findings.add(*by_header)
    if findings:
        return findings.result(NAME, "", note=note)
    prompt = make_prompt(facts, options)
    with facts.dense.reader() as dense, facts.moe.reader() as moe:
        try:
            found = run_side_by_side(facts, dense, moe, prompt, copied, watch or Watch())
            picture = picture_metrics(facts, dense, moe)
            overflows = list(_float16_overflow(facts, moe, prompt))
        except TransformersError as error:
            findings.add(f"transformers could not run the MoE: {error}")
            return findings.result(NAME, "", note=note)
    not_finite = list(_not_finite(found.comparison))
    by_router = found.routing.failures if not_finite else []
    findings.add(*not_finite, *by_router, *overflows, *_overflows(found.largest))
    if not_finite:
        return findings.result(NAME, "", {"tokens": prompt.ids.numel()})
    metrics = _metrics(found, prompt) | found.routing.metrics | picture
    if found.largest is not None:
        metrics["max_expert_output"] = found.largest
    measured = _in_words(prompt, metrics, found)
    detail = f"Measured only, since this MoE does not promise equality: {objection}."
    if objection is None:
        judge = _exact if facts.standard.uniform else _approximate
        detail, failures = judge(facts, metrics)
        findings.add(*failures, *rounding_failures(metrics, "dense"), *found.routing.failures)
    note = measured if findings else ""
    result = findings.result(NAME, f"{detail} {measured}", metrics, note)
    only_measured = objection is not None and not findings
    status = Status.MEASURED if only_measured else result.status
    return replace(
        result,
        status=status,
        layers=found.layers,
        texts=_texts(found, prompt),
        continuation=found.continuation,
    )


def _texts(found: Found, prompt: Prompt) -> tuple[TextMeasure, ...]:
    kl = found.comparison.kl.reshape(prompt.ids.shape).tolist()
    finite = ([value if math.isfinite(value) else None for value in row] for row in kl)
    return tuple(
        TextMeasure(tokens=words, kl=row[: len(words)])
        for words, row in zip(prompt.words, finite, strict=True)
        if words
    )


def _not_finite(comparison: Comparison) -> Iterator[str]:
    for who, softmax in (("MoE", comparison.moe), ("dense model", comparison.published)):
        if softmax.not_finite:
            yield f"{softmax.not_finite} of {softmax.shown} logits of the {who} are not finite"


def _float16_overflow(facts: Facts, moe: Reader, prompt: Prompt) -> Iterator[str]:
    """Run a model that is stored in float16 in it."""
    if "F16" not in {entry.dtype for entry in facts.moe.tensors.values()}:
        return
    model = moe_model(facts, moe, torch.float16)
    with transformers_says(), started(model, prompt.ids, ()) as run:
        while run.output is None:
            run.steps.advance()
        logits = ending_of(run).logits(size=1 << 12)
        bad = sum(int((~block.isfinite()).sum()) for block in logits)
    if bad:
        yield (
            f"run in float16, as it is stored, {bad} logits of the MoE are not finite; convert to "
            "bfloat16 or float32 instead"
        )


def _overflows(largest: float | None) -> Iterator[str]:
    if largest is not None and not largest <= _FLOAT16_MAX:
        yield (
            f"max_expert_output is {largest:.4g}: the experts are stored in float16, and run in "
            f"it an expert's output before its gate exceeds {_FLOAT16_MAX:g} and becomes "
            "infinite; convert to bfloat16 or float32 instead"
        )


def _metrics(found: Found, prompt: Prompt) -> dict[str, Any]:
    """Return the metrics: KL(dense ‖ MoE) in nats per token, NLL of the text alone, and others.

    Both models are also compared with the dense one whose weights are rounded as the MoE's are:
    what is between the two dense ones is the price of the dtype, and the rest the conversion's.
    """
    comparison, whole_P = found.comparison, found.routing.whole_everywhere
    points = torch.tensor([0.5, 0.9, 0.99], dtype=torch.double)
    quantiles = torch.quantile(comparison.kl, points).tolist()
    whole_kl_P = comparison.conversion[whole_P]
    return {
        **text_metrics(comparison, prompt),
        **dict(zip(("kl_median", "kl_p90", "kl_p99"), quantiles, strict=True)),
        "kl_mean_whole": float(whole_kl_P.mean()) if len(whole_kl_P) else math.nan,
    }


def text_metrics(comparison: Comparison, prompt: Prompt) -> dict[str, float]:
    """Return what is measured of any two models, whatever the second was made by."""
    p, r, q = comparison.published, comparison.rounded, comparison.moe
    follows_P = prompt.targets >= 0
    return {
        "kl_mean": float(comparison.kl.mean()),
        "kl_max": float(comparison.kl.max()),
        "kl_mean_rounding": float(comparison.rounding.mean()),
        "kl_mean_conversion": float(comparison.conversion.mean()),
        "max_abs_logit_diff": comparison.max_abs_logit_diff,
        "top1_agreement": float((p.best == q.best).double().mean()),
        "top1_agreement_conversion": float((r.best == q.best).double().mean()),
        "dense_nll": float(p.nll[follows_P].mean()),
        "moe_nll": float(q.nll[follows_P].mean()),
        "tokens": prompt.ids.numel(),
        "text_tokens": sum(map(len, prompt.words)),
    }


def text_words(metrics: Mapping[str, float], prompt: Prompt, first: str) -> str:
    """Return what is said of those; random tokens are no text that a model could know."""
    measured = [
        f"On {prompt.origin}: mean KL {metrics['kl_mean']:.2g}",
        f"top-1 agreement {metrics['top1_agreement']:.2%}",
    ]
    if metrics["text_tokens"]:
        measured.append(
            f"NLL of the text {metrics['moe_nll']:.4f} against {metrics['dense_nll']:.4f} for the "
            f"{first}"
        )
    return f"{', '.join(measured)}."


def _in_words(prompt: Prompt, metrics: Mapping[str, float], found: Found) -> str:
    cost = metrics["kl_mean_rounding"]
    picture = ""
    if "kl_mean_picture" in metrics:
        picture = (
            f"On a drawn picture of {metrics['picture_tokens']} tokens with text: mean KL "
            f"{metrics['kl_mean_picture']:.2g}. "
        )
    rounding = f"Rounding its weights alone costs a mean KL of {cost:.2g}. "
    worst = max(found.layers, key=lambda layer: layer.added_rms)
    return (
        f"{text_words(metrics, prompt, 'dense model')} "
        f"{rounding if found.has_rounded else ''}{picture}"
        f"The experts of a layer add an error of at most {worst.added_rms:.2g} (layer "
        f"{worst.layer}), relative to the dense MLP. "
        f"Groups stayed whole in {1 - metrics['split_token_layers']:.2%} of tokens and layers; "
        f"expert load varies by {metrics['expert_load_cv']:.2f} (standard deviation / mean)."
    )


def rounding_failures(metrics: Mapping[str, float], whose: str) -> Iterator[str]:
    """Say where the dtype costs more than a conversion may."""
    cost = metrics["kl_mean_rounding"]
    if not cost <= _MOST_ROUNDING_KL:
        yield (
            f"kl_mean_rounding is {cost:.3g}: rounding the {whose} weights to the MoE's dtypes "
            f"costs more than {_MOST_ROUNDING_KL:g}; convert to another dtype"
        )


def _exact(facts: Facts, metrics: Mapping[str, float]) -> tuple[str, list[str]]:
    """Say what the MoE owes, and where what was measured is not that."""
    factors = recover_factors(facts)
    lossless = all(is_power_of_two(factors[matrix]) for matrix in facts.kind.matrices)
    names = {facts.locate(part, layer, 0).tensor for layer in facts.layers for part in facts.parts}
    rounded = max(_ROUNDED_KL[facts.moe.tensors[name].dtype] for name in names)
    failures = [*exact_failures(metrics, None if lossless else rounded)]
    if facts.group_size > 1:
        failures += _split_failures(metrics, _MOST_SPLIT_EXACT)
    rounding = "" if lossless else " up to the rounding of the scaled weights"
    return f"The same function{rounding}.", failures


def exact_failures(metrics: Mapping[str, float], rounded: float | None = None) -> Iterator[str]:
    """Say where two models do not compute the same; `rounded` is what KL rounding can make."""
    bound = _EXACT_KL if rounded is None else rounded
    for key in ("kl_mean_conversion", "kl_mean_picture"):
        if key in metrics and not metrics[key] < bound:
            yield f"{key} is {metrics[key]:.3g}, and less than {bound:g} is promised"
    top1 = metrics["top1_agreement_conversion"]
    # Among few tokens a single near-tie must not decide.
    disagreeing = round((1 - top1) * metrics["tokens"])
    if rounded is None and top1 < _EXACT_TOP1 and disagreeing > 1:
        least = f"at least {_EXACT_TOP1:.1%} is promised"
        yield f"top1_agreement_conversion is {top1:.4%}, and {least}"


def _approximate(facts: Facts, metrics: Mapping[str, float]) -> tuple[str, list[str]]:
    std, kl = facts.logit_std, metrics["kl_mean_whole"]
    # Whatever the routers turn out to be, no error larger than the ceiling's was promised.
    bound = 30 * min(std, APPROXIMATE_LOGIT_STD) ** 2 + 1e-4
    failures = []
    if not kl <= bound:
        failures.append(
            f"kl_mean_whole is {kl:.3g}, and with router logits of standard deviation {std:.3g} at "
            f"most {bound:.3g} is promised"
        )
    owed = "The same function up to an error of the order of the router's logits"
    failures += _split_failures(metrics, _MOST_SPLIT)
    return f"{owed} (standard deviation {std:.3g}).", failures


def _split_failures(metrics: Mapping[str, float], most: float) -> Iterator[str]:
    split = metrics["split_token_layers"]
    if not split < most:
        yield (
            f"split_token_layers is {split:.3g}: that share of tokens and layers chose experts "
            f"that are not whole groups, and less than {most:g} is expected"
        )
