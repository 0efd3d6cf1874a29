"""Outputs: do both models, run by transformers' own code, predict the same next tokens?

Both run in float32 on the same text, the dense model as it was published and once more with its
weights rounded to the MoE's dtypes, which tells the price of the dtype from that of the conversion.
Only one model is in memory at a time. The difference is held to what the MoE owes: nothing beyond
arithmetic, or an error of the order of the router's logits. Where it owes nothing, the difference
is measured, and that is not a pass.

Legend: S positions, V vocabulary, E groups, G shards, N = E·G experts, T top-k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from upcycle_cli.checkpoint import TORCH_DTYPES
from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.mlp import holder
from upcycle_cli.verification.factors import is_power_of_two, recover_factors
from upcycle_cli.verification.facts import Facts
from upcycle_cli.verification.loading import MoeLoader
from upcycle_cli.verification.models import (
    Model,
    TransformersError,
    load_model,
    names_on_disk,
    transformers_says,
)
from upcycle_cli.verification.prompts import Prompt, make_prompt
from upcycle_cli.verification.recipes import APPROXIMATE_LOGIT_STD
from upcycle_cli.verification.report import CheckResult, Findings, Status
from upcycle_cli.verification.routing import watched_routers

NAME = "outputs"
_CHUNK = 64  # positions whose distributions are in memory in float64 at once

_EXACT_KL = 1e-8
_ROUNDED_KL = {"BF16": 1e-3, "F16": 1e-4, "F32": 1e-8}
_EXACT_TOP1 = 0.999
_MOST_ROUNDING_KL = 1e-2
_MOST_SPLIT = 1e-2
_MOST_SPLIT_EXACT = 1e-3
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class _Dense:
    """Logits (S, V) of the dense model as published, and with its weights rounded as the MoE's."""

    published: torch.Tensor
    rounded: torch.Tensor
    largest: float | None
    """The largest output of an expert stored in float16, None when there is none."""


def check_outputs(
    facts: Facts, loader: MoeLoader, prompts: Path | None, objection: str | None
) -> CheckResult:
    """Compare the logits of both models; `objection` says why nothing is promised, if so.

    Raises UpcycleError when the dense model cannot run.
    """
    too_large = loader.outputs_objection
    if too_large is not None:
        return CheckResult(name=NAME, status=Status.SKIPPED, detail=f"Not run: {too_large}.")
    findings = Findings()
    loading, note = loader.take(), "The outputs could not be compared."
    odd = [entry for entry in facts.moe.tensors.values() if entry.dtype not in TORCH_DTYPES]
    words = [f"{entry.name} is {entry.dtype}, which no weight is" for entry in odd]
    for complaint in (*words, *loading.complaints):
        findings.add(complaint)
    if findings:
        return findings.result(NAME, "", note=note)
    assert loading.model is not None
    prompt = make_prompt(facts, loading.model.config, prompts)
    try:
        # The hooks see what the model really chose, ties in its own arithmetic included.
        with transformers_says(), watched_routers(facts, loading.model) as routing:
            moe_SV = _logits(loading.model, prompt)
        overflows = list(_float16_overflow(facts, loading.model, prompt))
    except TransformersError as error:
        findings.add(f"transformers could not run the MoE: {error}")
        return findings.result(NAME, "", note=note)
    del loading
    dense = _run_dense(facts, prompt)
    not_finite = list(_not_finite(moe_SV, dense.published))
    by_router = routing.failures if not_finite else []
    for failure in (*not_finite, *by_router, *overflows, *_overflows(dense.largest)):
        findings.add(failure)
    if not_finite:
        return findings.result(NAME, "", {"tokens": prompt.ids.numel()})
    metrics = _measure(dense, moe_SV, prompt, routing.whole_everywhere) | routing.metrics
    if dense.largest is not None:
        metrics["max_expert_output"] = dense.largest
    measured = _in_words(prompt, metrics, rounded=dense.rounded is not dense.published)
    detail = f"Measured only, since this MoE does not promise equality: {objection}."
    if objection is None:
        detail, failures = _judged(facts, metrics)
        for failure in (*failures, *routing.failures):
            findings.add(failure)
    note = measured if findings else ""
    result = findings.result(NAME, f"{detail} {measured}", metrics, note)
    only_measured = objection is not None and not findings
    return replace(result, status=Status.MEASURED) if only_measured else result


def _not_finite(moe_SV: torch.Tensor, dense_SV: torch.Tensor) -> Iterator[str]:
    for who, logits in (("MoE", moe_SV), ("dense model", dense_SV)):
        bad = int((~logits.isfinite()).sum())
        if bad:
            yield f"{bad} of {logits.numel()} logits of the {who} are not finite"


def _float16_overflow(facts: Facts, model: Model, prompt: Prompt) -> Iterator[str]:
    """Run a model that is stored in float16 in it; the model is no good for anything else then."""
    if "F16" not in {entry.dtype for entry in facts.moe.tensors.values()}:
        return
    with transformers_says():
        bad = int((~_logits(model.half(), prompt).isfinite()).sum())
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


def _run_dense(facts: Facts, prompt: Prompt) -> _Dense:
    try:
        model, info = load_model(facts.dense.path, torch.float32)
        missing = sorted(info["missing_keys"])
        if missing:
            raise UpcycleError(f"{facts.dense.path} lacks {missing[0]}, says transformers.")
        with transformers_says(), _watched_experts(facts, model) as largest:
            published_SV = _logits(model, prompt)
        rounded_SV = published_SV
        if _round(facts, model):
            with transformers_says():
                rounded_SV = _logits(model, prompt)
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {facts.dense.path}: {error}") from error
    found = float(torch.stack(largest).max()) if largest else None
    return _Dense(published_SV, rounded_SV, found)


def _round(facts: Facts, model: Model) -> bool:
    """Round a dense model's weights to the MoE's dtypes; return whether that changed any."""
    changed = False
    for name, parameter in model.named_parameters():
        (written,) = names_on_disk(model, {name: parameter.data})
        entry = facts.moe.tensors.get(facts.became.get(written, written))
        if entry is None:  # an untied head in dense, a tied one in the MoE: nothing was rounded
            continue
        rounded = parameter.data.to(getattr(torch, TORCH_DTYPES[entry.dtype])).float()
        changed = changed or not torch.equal(rounded, parameter.data)
        parameter.data = rounded
    return changed


@contextmanager
def _watched_experts(facts: Facts, model: Model) -> Iterator[list[torch.Tensor]]:
    """Note, per layer in float16, the largest output that an expert has before its gate.

    Experts are shards of the dense MLP, so the dense run shows what each of them, chosen or not,
    makes of every token. It is run in float32, where nothing overflows.
    """
    held = {name for name, entry in facts.moe.tensors.items() if entry.dtype == "F16"}
    matrices, experts = facts.kind.matrices, range(facts.num_experts)
    float16 = [
        layer
        for layer in facts.layers
        if any(facts.place(m, layer, e).tensor in held for m in matrices for e in experts)
    ]
    largest: list[torch.Tensor] = []
    factors = recover_factors(facts) if float16 else {}
    scale = factors.get("up", math.nan) ** facts.kind.degree * factors.get("down", math.nan)
    if math.isnan(scale):
        yield largest
        return

    def note(down: Model, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        hidden_SI = inputs[0].flatten(0, -2)
        for shard in range(facts.granularity):
            part = slice(shard * facts.expert_size, (shard + 1) * facts.expert_size)
            # As a linear layer's weight, whose columns count its input.
            output_SH = hidden_SI[:, part] @ down.weight[:, part].T
            largest.append(output_SH.abs().max() * scale)

    down = holder(facts.dense_mlp, "down").name.removesuffix(".weight")
    modules = [model.base_model.layers[layer].get_submodule(down) for layer in float16]
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _logits(model: Model, prompt: Prompt) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=prompt.ids, use_cache=False).logits[0].float()
    return logits


def _measure(
    dense: _Dense, moe_SV: torch.Tensor, prompt: Prompt, whole_S: torch.Tensor
) -> dict[str, float]:
    """Return the metrics: KL(dense ‖ MoE) in nats per token, NLL of the text alone, and others.

    Both models are also compared with the dense one whose weights are rounded as the MoE's are:
    what is between the two dense ones is the price of the dtype, and the rest the conversion's.
    """
    kl: dict[str, list[torch.Tensor]] = {"": [], "_rounding": [], "_conversion": []}
    gap = dense_nll = moe_nll = 0.0
    ids, text = prompt.ids[0], prompt.ids[0][: prompt.text_tokens]
    for begin in range(0, len(ids), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        logits = [held[rows].double() for held in (dense.published, dense.rounded, moe_SV)]
        gap = max(gap, float((logits[0] - logits[2]).abs().max()))
        published, rounded, moe = (held.log_softmax(-1) for held in logits)
        between = (published, moe), (published, rounded), (rounded, moe)
        for key, (log_p, log_q) in zip(kl, between, strict=True):
            kl[key].append((log_p.exp() * (log_p - log_q)).sum(-1))
        following = text[begin + 1 : begin + 1 + _CHUNK].unsqueeze(-1)
        dense_nll -= float(published[: len(following)].gather(-1, following).sum())
        moe_nll -= float(moe[: len(following)].gather(-1, following).sum())
    kl_S = {key: torch.cat(pieces) for key, pieces in kl.items()}
    predicted = len(text) - 1
    moe_best = moe_SV.argmax(-1)
    conversion = kl_S["_conversion"]
    return {
        "kl_mean": float(kl_S[""].mean()),
        "kl_max": float(kl_S[""].max()),
        "kl_mean_rounding": float(kl_S["_rounding"].mean()),
        "kl_mean_conversion": float(conversion.mean()),
        "kl_mean_whole": float(conversion[whole_S].mean()) if bool(whole_S.any()) else math.nan,
        "max_abs_logit_diff": gap,
        "top1_agreement": _share(dense.published.argmax(-1) == moe_best),
        "top1_agreement_conversion": _share(dense.rounded.argmax(-1) == moe_best),
        "dense_nll": dense_nll / predicted if predicted else math.nan,
        "moe_nll": moe_nll / predicted if predicted else math.nan,
        "tokens": len(ids),
        "text_tokens": len(text),
    }


def _share(marked: torch.Tensor) -> float:
    return float(marked.double().mean())


def _in_words(prompt: Prompt, metrics: Mapping[str, float], *, rounded: bool) -> str:
    cost = metrics["kl_mean_rounding"]
    rounding = f"Rounding its weights alone costs a mean KL of {cost:.2g}. " if rounded else ""
    return (
        f"On {prompt.origin}: mean KL {metrics['kl_mean']:.2g}, "
        f"top-1 agreement {metrics['top1_agreement']:.2%}, "
        f"NLL of the text {metrics['moe_nll']:.4f} against {metrics['dense_nll']:.4f} for the "
        f"dense model. {rounding}"
        f"Groups stayed whole in {1 - metrics['split_token_layers']:.2%} of tokens and layers; "
        f"expert load varies by {metrics['expert_load_cv']:.2f} (standard deviation / mean)."
    )


def _judged(facts: Facts, metrics: Mapping[str, float]) -> tuple[str, list[str]]:
    """Hold what was measured against what the MoE owes: what that is, and what fails."""
    owed, failures = (_exact if facts.standard.uniform else _approximate)(facts, metrics)
    cost = metrics["kl_mean_rounding"]
    if not cost <= _MOST_ROUNDING_KL:
        failures.append(
            f"kl_mean_rounding is {cost:.3g}: rounding the dense weights to the MoE's dtypes "
            f"costs more than {_MOST_ROUNDING_KL:g}; convert to another dtype"
        )
    return owed, failures


def _exact(facts: Facts, metrics: Mapping[str, float]) -> tuple[str, list[str]]:
    factors = recover_factors(facts)
    lossless = all(is_power_of_two(factors[matrix]) for matrix in facts.kind.matrices)
    names = {facts.place(part, layer, 0).tensor for layer in facts.layers for part in facts.parts}
    rounded = max(_ROUNDED_KL[facts.moe.tensors[name].dtype] for name in names)
    bound = _EXACT_KL if lossless else rounded
    kl, top1 = metrics["kl_mean_conversion"], metrics["top1_agreement_conversion"]
    failures = []
    if not kl < bound:
        failures.append(f"kl_mean_conversion is {kl:.3g}, and less than {bound:g} is promised")
    # Among few tokens a single near-tie must not decide.
    disagreeing = round((1 - top1) * metrics["tokens"])
    if lossless and top1 < _EXACT_TOP1 and disagreeing > 1:
        least = f"at least {_EXACT_TOP1:.1%} is promised"
        failures.append(f"top1_agreement_conversion is {top1:.4%}, and {least}")
    if facts.granularity > 1:
        failures += _split_failures(metrics, _MOST_SPLIT_EXACT)
    rounding = "" if lossless else " up to the rounding of the scaled weights"
    return f"The same function{rounding}.", failures


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
