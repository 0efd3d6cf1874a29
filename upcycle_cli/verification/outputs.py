"""The check `outputs`: do both models predict the same next tokens?

transformers' own code runs both in float32 on the same tokens, with the weights left on disk. The
promise limits the difference: rounding of arithmetic, or an error of the order of the router's
logits. Without a promise the difference is only measured. Nothing here uses the planner, so this
check finds a planner that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.recipe.options import Promise
from upcycle_cli.run.lazy_models import lazy_model
from upcycle_cli.run.models import TransformersError, source_errors
from upcycle_cli.verification.logit_divergence import Divergence
from upcycle_cli.verification.pictures import picture_metrics
from upcycle_cli.verification.prompts import Prompt, TextOptions, make_prompt
from upcycle_cli.verification.result import CheckResult, Findings, LayerMeasure, TextMeasure
from upcycle_cli.verification.side_by_side import rounding, run_side_by_side

_NAME = "outputs"
_EXACT_KL = 1e-8
_ROUNDED_KL = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 1e-8}
"""The largest mean KL of an exact recipe with rounded factors, by the dtype of the experts."""
_EXACT_TOP1 = 0.999
_MOST_ROUNDING_KL = 1e-2
_MOST_SPLIT_EXACT = 1e-3
_MOST_SPLIT = 1e-2
_LARGEST_LOGIT_STD = 0.05
"""Above this standard deviation of the router's logits softmax-topk promises no equality."""
_LIMITS = {
    "kl_mean_whole": "mean KL to the {source} is {found:.2g}; {recipe} allows {most:.2g}",
    "kl_mean_picture": "mean KL to the {source} on a picture is {found:.2g}; {recipe} allows "
    "{most:.2g}",
    "kl_mean_rounding": "rounding the weights to the MoE's dtype alone costs a mean KL of "
    "{found:.2g}; at most {most:.2g} is allowed. Convert to another dtype",
    "split_token_layers": "{found:.2%} of tokens and layers got parts of groups; {recipe} allows "
    "{most:.1%}",
}
"""The message for a metric that is above its limit."""
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the outputs of an MoE must satisfy, as plain values."""

    promise: Promise
    reason: str = ""
    """Why the promise is none, if it is."""
    group_size: int = 1
    """How many neighbouring experts share a router row."""
    logit_std: float = 0.0
    """The standard deviation of the router's logits, for an approximate promise."""
    is_lossless: bool = True
    """Whether all factors on expert weights and biases are powers of two."""
    source: str = "dense model"
    """How messages call the model that the MoE was made from."""


def check_outputs(
    dense: Checkpoint,
    moe: Checkpoint,
    expected: Expectation,
    texts: TextOptions,
    watch: Progress | None = None,
) -> CheckResult:
    """Compare the predictions of an MoE and its source; UpcycleError if the source cannot run."""
    with dense.reader() as dense_reader, moe.reader() as moe_reader:
        try:
            readers = dense_reader, moe_reader
            return _compare(dense, moe, readers, expected, texts, watch or Progress())
        except TransformersError as error:
            findings = Findings([f"transformers could not run the MoE: {error}"])
            return findings.result(_NAME, "", note="The outputs could not be compared.")


@contextmanager
def _moe_errors() -> Iterator[None]:
    """Turn an UpcycleError about the MoE into the failure of this check."""
    try:
        yield
    except UpcycleError as error:
        raise TransformersError(error.message) from error


def _compare(
    dense: Checkpoint,
    moe: Checkpoint,
    readers: tuple[Reader, Reader],
    expected: Expectation,
    texts: TextOptions,
    watch: Progress,
) -> CheckResult:
    dense_reader, moe_reader = readers
    largest: dict[str, float] = {}

    def observe(name: str, values: torch.Tensor) -> None:
        if values.numel():
            value = float(values.abs().max().nan_to_num(math.inf, math.inf))
            largest[name] = max(value, largest.get(name, 0.0))

    is_float16 = any(entry.dtype == "F16" for entry in moe.tensors.values())
    with _moe_errors():
        upcycled = lazy_model(moe, moe_reader, observe=observe if is_float16 else None)
    experts = upcycled.experts
    if experts is None or experts.num_experts % expected.group_size:
        raise TransformersError("its config.json does not describe experts in such groups")
    with source_errors(dense.path):
        sources = [lazy_model(dense, dense_reader)]
    if (round_to := rounding(sources[0], upcycled)) is not None:
        sources.append(lazy_model(dense, dense_reader, round_to=round_to))
    seed_bytes = b"".join(
        bytes(moe_reader.mapped(name))
        for name in map(experts.router_name, experts.layers)
        if name in moe.tensors
    )
    prompt, size = make_prompt(dense, texts, seed_bytes), expected.group_size
    with _moe_errors():
        compared, layers, routing = run_side_by_side(sources, upcycled, prompt, size, watch)
    findings = Findings()
    for who, softmax in (("MoE", compared[0].q), ("dense model", compared[0].p)):
        if softmax.not_finite:
            findings.append(f"{softmax.not_finite} logits of the {who} are not finite")
    if findings:
        findings += [*routing.failures, *_overflow(largest)]
        return findings.result(_NAME, "", {"tokens": prompt.ids.numel()})
    metrics = _metrics(compared, torch.stack(routing.whole).all(0), layers, prompt)
    metrics |= picture_metrics(sources[-1], upcycled)
    if largest:
        metrics["max_float16_value"] = max(largest.values())
    findings += _overflow(largest)
    measured = _in_words(prompt, metrics, layers, expected.source)
    detail = f"This MoE does not promise equality, so it was measured: {expected.reason}."
    is_measured = expected.promise is Promise.NONE
    if not is_measured:
        bound = _EXACT_KL if expected.is_lossless else _ROUNDED_KL[upcycled.expert_dtype]
        detail, failures = _judge(expected, metrics, bound)
        findings += [*failures, *routing.failures]
    note = measured if findings else ""
    result = findings.result(_NAME, f"{detail} {measured}", metrics, note, is_measured=is_measured)
    rows = zip(prompt.words, compared[0].kl.reshape(prompt.ids.shape).tolist(), strict=True)
    held = (TextMeasure(tokens=words, kl=row[: len(words)]) for words, row in rows if words)
    return replace(result, layers=tuple(layers), texts=tuple(held))


def _overflow(largest: Mapping[str, float]) -> list[str]:
    """Say which weight's values exceed float16 most; `largest` is empty for other dtypes."""
    name = max(largest, key=largest.__getitem__, default="")
    if not name or largest[name] <= _FLOAT16_MAX:
        return []
    return [
        f"{name}: values reach {largest[name]:.4g} at run time, but the model is in float16, "
        f"which ends at {_FLOAT16_MAX:g}; convert to bfloat16 or float32"
    ]


def _metrics(
    compared: Sequence[Divergence],
    whole_P: torch.Tensor,
    layers: Sequence[LayerMeasure],
    prompt: Prompt,
) -> dict[str, Any]:
    """Return the metrics: KL(dense ‖ MoE) in nats per token, NLL of the text, and others.

    `rounding` compares the dense model with its rounded weights, `conversion` the rounded model
    with the MoE, `whole` the same at tokens that got whole groups in every layer.
    """
    whole, rounded, conversion = compared
    p, r, q = whole.p, conversion.p, whole.q
    whole_kl_P, follows_P = conversion.kl[whole_P], prompt.targets >= 0
    return {
        "kl_mean": float(whole.kl.mean()),
        "kl_max": float(whole.kl.max()),
        "kl_mean_rounding": float(rounded.kl.mean()),
        "kl_mean_conversion": float(conversion.kl.mean()),
        "max_abs_logit_diff": float(whole.most.max()),
        "top1_agreement": float((p.best == q.best).double().mean()),
        "top1_agreement_conversion": float((r.best == q.best).double().mean()),
        "dense_nll": float(p.nll[follows_P].mean()),
        "moe_nll": float(q.nll[follows_P].mean()),
        "tokens": prompt.ids.numel(),
        "text_tokens": sum(map(len, prompt.words)),
        "kl_mean_whole": float(whole_kl_P.mean()) if len(whole_kl_P) else math.nan,
        "split_token_layers": 1 - fmean(layer.whole_share for layer in layers),
        "expert_load_cv": fmean(layer.load_cv for layer in layers),
    }


def _in_words(
    prompt: Prompt, metrics: Mapping[str, float], layers: Sequence[LayerMeasure], source: str
) -> str:
    worst = max(layers, key=lambda layer: layer.added_rms)
    text = ""
    if metrics["text_tokens"]:
        text = f", NLL {metrics['moe_nll']:.4f} ({source} {metrics['dense_nll']:.4f})"
    words = [
        f"On {prompt.origin}: mean KL {metrics['kl_mean']:.2g}, top-1 agreement "
        f"{metrics['top1_agreement']:.2%}{text}."
    ]
    if cost := metrics["kl_mean_rounding"]:
        words.append(f"Rounding the weights alone costs a mean KL of {cost:.2g}.")
    if "kl_mean_picture" in metrics:
        words.append(
            f"On a random picture of {metrics['picture_tokens']} tokens with text: mean KL "
            f"{metrics['kl_mean_picture']:.2g}."
        )
    words.append(
        f"Largest error of a layer's experts: {worst.added_rms:.2g} of the MLP's output (layer "
        f"{worst.layer}). Whole groups: {1 - metrics['split_token_layers']:.2%} of tokens and "
        f"layers. Expert load varies by {metrics['expert_load_cv']:.2f} (standard deviation / "
        "mean)."
    )
    return " ".join(words)


def _judge(
    expected: Expectation, metrics: Mapping[str, float], bound: float
) -> tuple[str, list[str]]:
    """Return the promise in words, and the failures."""
    is_exact, std = expected.promise is Promise.EXACT, expected.logit_std
    words = "" if expected.is_lossless else " up to the rounding of the scaled weights"
    detail = f"Both models compute the same function{words}."
    # Ties in float32 can split groups, so the limit holds for tokens with whole groups.
    limits = {"kl_mean_whole": bound, "kl_mean_picture": bound}
    if not is_exact:
        detail = (
            "Both models compute the same function up to an error of the order of the router's "
            f"logits (standard deviation {std:.3g})."
        )
        limits = {"kl_mean_whole": 30 * min(std, _LARGEST_LOGIT_STD) ** 2 + 1e-4}
    limits["kl_mean_rounding"] = _MOST_ROUNDING_KL
    if expected.group_size > 1:
        limits["split_token_layers"] = _MOST_SPLIT_EXACT if is_exact else _MOST_SPLIT
    recipe = "an exact recipe" if is_exact else "this recipe"
    failures = [
        _LIMITS[key].format(found=metrics[key], most=most, source=expected.source, recipe=recipe)
        for key, most in limits.items()
        if key in metrics and not metrics[key] <= most
    ]
    if math.isnan(metrics["kl_mean_whole"]):
        failures[0] = "no token got whole groups in every layer, so mean KL cannot be judged"
    top1 = metrics["top1_agreement_conversion"]
    # One near-tie among few tokens must not decide.
    disagreeing = round((1 - top1) * metrics["tokens"])
    if is_exact and expected.is_lossless and top1 < _EXACT_TOP1 and disagreeing > 1:
        failures.append(
            f"top-1 agreement with the {expected.source} is {top1:.2%}; an exact recipe needs at "
            f"least {_EXACT_TOP1:.1%}"
        )
    return detail, failures
