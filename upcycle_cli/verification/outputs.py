"""Outputs: do both models, run by transformers' own code, predict the same next tokens?

Both run in float32 on the same text, the dense weights first rounded to the MoE's dtypes, so that
what is left is the conversion. Only one model is in memory at a time. The difference is held to
what the recipe promises: nothing beyond arithmetic, an error of order of the router's logits, or
no equality at all; then it is only measured.

Legend: S positions, V vocabulary, E groups, G shards, N = E·G experts, T top-k.
"""

from __future__ import annotations

import codecs
import math
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint import TORCH_DTYPES
from upcycle_cli.errors import UpcycleError
from upcycle_cli.verification.facts import (
    APPROXIMATE_LOGIT_STD,
    MATRICES,
    Facts,
    Promise,
    dense_mlp_name,
)
from upcycle_cli.verification.models import (
    MOST_TOKENS,
    MoeLoader,
    TransformersError,
    load_model,
    load_tokenizer,
    tokenizer_files,
    transformers_says,
)
from upcycle_cli.verification.report import CheckResult, Findings, Status
from upcycle_cli.verification.weights import is_power_of_two, recover_factors

if TYPE_CHECKING:
    import torch

NAME = "outputs"
_FEWEST_TOKENS = 512
_MOST_PROMPT_BYTES = 1_000_000
_CHUNK = 64  # positions whose distributions are in memory in float64 at once

_EXACT_KL = 1e-8
_ROUNDED_KL = {"BF16": 1e-3, "F16": 1e-4, "F32": 1e-8}
_EXACT_TOP1 = 0.999
_MOST_SPLIT = 1e-2
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class _Prompt:
    """Token ids of shape (1, S), and where they come from, for a person."""

    ids: torch.Tensor
    origin: str


@dataclass(frozen=True)
class _Routing:
    """What the routers chose: `whole` (S,) marks the tokens with whole groups in every layer."""

    whole: torch.Tensor
    split_share: float
    load_cv: float


def check_outputs(facts: Facts, loader: MoeLoader, prompts: Path | None) -> CheckResult:
    """Compare the logits of both models; raises UpcycleError when the dense model cannot run."""
    objection = loader.outputs_objection
    if objection is not None:
        return CheckResult(name=NAME, status=Status.SKIPPED, detail=f"Not run: {objection}.")
    findings = Findings()
    for name, entry in facts.moe.tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            findings.add(f"{name} is {entry.dtype}, which no weight is")
    loading = loader.take()
    for complaint in loading.complaints:
        findings.add(complaint)
    if findings:
        return findings.result(NAME, "", note="The outputs could not be compared.")
    assert loading.model is not None
    prompt = _prompt(facts, loading.model.config, prompts)
    try:
        moe_SV, chosen = _run_moe(facts, loading.model, prompt)
    except TransformersError as error:
        findings.add(f"transformers could not run the MoE: {error}")
        return findings.result(NAME, "", note="The outputs could not be compared.")
    del loading
    dense_SV, largest = _run_dense(facts, prompt)
    not_finite = list(_not_finite(moe_SV, dense_SV))
    for failure in (*not_finite, *_overflows(largest)):
        findings.add(failure)
    if not_finite:
        return findings.result(NAME, "", {"tokens": prompt.ids.numel()})
    routing = _routing(facts, chosen)
    metrics = _measure(dense_SV, moe_SV, prompt.ids[0], routing.whole)
    metrics |= {
        "split_token_layers": routing.split_share,
        "expert_load_cv": routing.load_cv,
    }
    if largest is not None:
        metrics["max_expert_output"] = largest
    return _judge(facts, metrics, prompt, findings)


def _not_finite(moe_SV: torch.Tensor, dense_SV: torch.Tensor) -> Iterator[str]:
    for who, logits in (("MoE", moe_SV), ("dense model", dense_SV)):
        bad = int((~logits.isfinite()).sum())
        if bad:
            yield f"{bad} of {logits.numel()} logits of the {who} are not finite"


def _overflows(largest: float | None) -> Iterator[str]:
    if largest is not None and not largest <= _FLOAT16_MAX:
        yield (
            f"max_expert_output is {largest:.4g}: the experts are stored in float16, and run in "
            f"it an expert's output before its gate exceeds {_FLOAT16_MAX:g} and becomes "
            "infinite; convert to bfloat16 or float32 instead"
        )


def read_prompts(path: Path) -> str:
    """Return the beginning of a prompts file; raises UpcycleError when it has no text in it."""
    try:
        # A device has no end, and a pipe may have no beginning.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UpcycleError(f"the prompts {path} are not a regular file.")
        with path.open("rb") as file:
            data = file.read(_MOST_PROMPT_BYTES)
            whole = not file.read(1)
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except OSError as error:
        raise UpcycleError(f"cannot read the prompts {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UpcycleError(f"the prompts {path} are not UTF-8 text.") from error
    if not text.strip():
        raise UpcycleError(f"the prompts {path} are empty.", "Give a file with some text in it.")
    return text


def _prompt(facts: Facts, config: Any, prompts: Path | None) -> _Prompt:  # noqa: ANN401
    """Return one sequence of text, or of random tokens where there is no tokenizer for text."""
    import torch

    limit = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
    vocab_size: int = config.vocab_size
    reason = "the dense model has no tokenizer"
    if tokenizer_files(facts.dense):
        text = _builtin_text() if prompts is None else read_prompts(prompts)
        source = "built-in English text" if prompts is None else f"the text of {prompts.name}"
        try:
            tokenizer = load_tokenizer(facts.dense.path)
            with transformers_says():
                ids = list(tokenizer(text)["input_ids"])
        except TransformersError as error:
            reason = f"the dense model's tokenizer cannot be used ({error})"
        else:
            if ids and max(ids) < vocab_size:
                repeats = math.ceil(_FEWEST_TOKENS / len(ids))
                ids = (ids * repeats)[: min(MOST_TOKENS, limit)]
                again = ", repeated" if repeats > 1 else ""
                return _Prompt(torch.tensor([ids]), f"{len(ids)} tokens of {source}{again}")
            reason = "the dense model's tokenizer makes no ids, or some beyond its vocabulary"
    if prompts is not None:
        raise UpcycleError(
            f"the prompts {prompts} cannot be used: {reason}.",
            "Without --prompts, random tokens are used.",
        )
    generator = torch.Generator().manual_seed(0)
    count = min(_FEWEST_TOKENS, limit)
    random_ids = torch.randint(vocab_size, (1, count), generator=generator)
    return _Prompt(random_ids, f"{count} random tokens, since {reason}")


def _builtin_text() -> str:
    return (files("upcycle_cli.verification") / "prompts.txt").read_text(encoding="utf-8")


def _run_moe(
    facts: Facts,
    model: Any,  # noqa: ANN401
    prompt: _Prompt,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits (S, V) and the chosen experts (S, T) of each layer."""
    chosen: list[torch.Tensor] = []
    # The hooks see what the model really chose, ties in its own arithmetic included.
    with transformers_says(), _watched_routers(facts, model, chosen):
        logits = _logits(model, prompt)
    return logits, chosen


@contextmanager
def _watched_routers(
    facts: Facts,
    model: Any,  # noqa: ANN401
    chosen: list[torch.Tensor],
) -> Iterator[None]:
    def note(_module: object, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        # Routers return logits, gates and the indices of the chosen experts.
        chosen.append(output[2])

    handles = []
    for layer in range(facts.num_layers):
        name = facts.target.names.fused_router.format(layer=layer).removesuffix(".weight")
        handles.append(model.get_submodule(name).register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_dense(facts: Facts, prompt: _Prompt) -> tuple[torch.Tensor, float | None]:
    """Return the dense model's logits (S, V), its weights rounded to the MoE's dtypes.

    The number is the largest output of an expert stored in float16, None when there is none.
    """
    import torch

    try:
        model, info = load_model(facts.dense.path, torch.float32)
        missing = sorted(info["missing_keys"])
        if missing:
            raise UpcycleError(f"{facts.dense.path} lacks {missing[0]}, says transformers.")
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(_moe_dtype(facts, name)).float()
        with transformers_says(), _watched_experts(facts, model) as largest:
            logits = _logits(model, prompt)
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {facts.dense.path}: {error}") from error
    return logits, float(torch.stack(largest).max()) if largest else None


@contextmanager
def _watched_experts(
    facts: Facts,
    model: Any,  # noqa: ANN401
) -> Iterator[list[torch.Tensor]]:
    """Note, per layer in float16, the largest output that an expert has before its gate.

    Experts are shards of the dense MLP, so the dense run shows what each of them, chosen or not,
    makes of every token. It is run in float32, where nothing overflows.
    """
    float16 = [
        layer
        for layer in range(facts.num_layers)
        if any(
            facts.moe.tensors[facts.place(matrix, layer, expert).tensor].dtype == "F16"
            for matrix in MATRICES
            for expert in range(facts.num_experts)
        )
    ]
    largest: list[torch.Tensor] = []
    factors = recover_factors(facts) if float16 else {}
    scale = factors.get("up", math.nan) * factors.get("down", math.nan)
    if math.isnan(scale):
        yield largest
        return

    def note(down: Any, inputs: tuple[torch.Tensor, ...], _output: object) -> None:  # noqa: ANN401
        hidden_SI = inputs[0].flatten(0, -2)
        for shard in range(facts.granularity):
            part = slice(shard * facts.expert_size, (shard + 1) * facts.expert_size)
            output_SH = hidden_SI[:, part] @ down.weight[:, part].T
            largest.append(output_SH.abs().max() * scale)

    handles = [
        model.get_submodule(f"model.layers.{layer}.mlp.down_proj").register_forward_hook(note)
        for layer in float16
    ]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _moe_dtype(facts: Facts, dense_name: str) -> torch.dtype:
    """Return the dtype in which the MoE holds what a dense tensor became."""
    import torch

    name = dense_name
    for layer in range(facts.num_layers):
        for matrix in MATRICES:
            if dense_name == dense_mlp_name(matrix, layer):
                name = facts.place(matrix, layer, 0).tensor
    entry = facts.moe.tensors.get(name)
    if entry is None:  # an untied head in dense, a tied one in the MoE: nothing was rounded
        return torch.float32
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
    return dtype


def _logits(model: Any, prompt: _Prompt) -> torch.Tensor:  # noqa: ANN401
    import torch

    with torch.no_grad():
        output = model(input_ids=prompt.ids, use_cache=False)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _routing(facts: Facts, chosen: list[torch.Tensor]) -> _Routing:
    """Count, for every token and layer, how much of each group was chosen."""
    import torch

    split, cvs = [], []
    for experts_ST in chosen:
        num_tokens = experts_ST.shape[0]
        picked_SN = torch.zeros(num_tokens, facts.num_experts).scatter_(1, experts_ST, 1.0)
        per_group_SE = picked_SN.reshape(num_tokens, facts.expansion, -1).sum(-1)
        whole = (per_group_SE == 0) | (per_group_SE == facts.granularity)
        split.append(~whole.all(-1))
        load = picked_SN.sum(0)
        cvs.append(float(load.std(correction=0) / load.mean()))
    split_LS = torch.stack(split)
    return _Routing(
        whole=~split_LS.any(0),
        split_share=float(split_LS.double().mean()),
        load_cv=sum(cvs) / len(cvs),
    )


def _measure(
    dense_SV: torch.Tensor,
    moe_SV: torch.Tensor,
    ids: torch.Tensor,
    whole: torch.Tensor,
) -> dict[str, float]:
    """Return the metrics of the comparison; KL is KL(dense ‖ MoE) in nats per token."""
    import torch

    kl, gap = [], 0.0
    dense_nll = moe_nll = 0.0
    for begin in range(0, len(ids), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        dense, moe = dense_SV[rows].double(), moe_SV[rows].double()
        gap = max(gap, float((dense - moe).abs().max()))
        log_p, log_q = dense.log_softmax(-1), moe.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        following = ids[begin + 1 : begin + 1 + _CHUNK].unsqueeze(-1)
        dense_nll -= float(log_p[: len(following)].gather(-1, following).sum())
        moe_nll -= float(log_q[: len(following)].gather(-1, following).sum())
    kl_S = torch.cat(kl)
    predicted = len(ids) - 1
    same = dense_SV.argmax(-1) == moe_SV.argmax(-1)
    return {
        "kl_mean": float(kl_S.mean()),
        "kl_max": float(kl_S.max()),
        "kl_mean_whole": float(kl_S[whole].mean()) if bool(whole.any()) else math.nan,
        "max_abs_logit_diff": gap,
        "top1_agreement": float(same.double().mean()),
        "dense_nll": dense_nll / predicted if predicted else math.nan,
        "moe_nll": moe_nll / predicted if predicted else math.nan,
        "tokens": len(ids),
    }


def _judge(
    facts: Facts, metrics: Mapping[str, float], prompt: _Prompt, findings: Findings
) -> CheckResult:
    kl, top1 = metrics["kl_mean"], metrics["top1_agreement"]
    measured = (
        f"On {prompt.origin}: mean KL {kl:.2g}, top-1 agreement {top1:.2%}, "
        f"NLL {metrics['moe_nll']:.4f} against {metrics['dense_nll']:.4f} for the dense model. "
        f"Groups stayed whole in {1 - metrics['split_token_layers']:.2%} of tokens and layers; "
        f"expert load varies by {metrics['expert_load_cv']:.2f} (standard deviation / mean)."
    )
    recipe = facts.recipe
    if recipe.router_logit_std is None:
        recipe = replace(recipe, router_logit_std=facts.logit_std)
    match recipe.promise:
        case Promise.NONE:
            reason = recipe.objection()
            promised = f"This recipe promises no equality: {reason}."
        case Promise.APPROXIMATE:
            promised = _judge_approximate(facts, metrics, findings)
        case Promise.EXACT:
            promised = _judge_exact(facts, metrics, findings)
    return findings.result(NAME, f"{promised} {measured}", metrics, measured if findings else "")


def _judge_exact(facts: Facts, metrics: Mapping[str, float], findings: Findings) -> str:
    factors = recover_factors(facts)
    lossless = all(map(is_power_of_two, factors.values()))
    dtypes = {
        facts.moe.tensors[facts.place(matrix, layer, 0).tensor].dtype
        for layer in range(facts.num_layers)
        for matrix in MATRICES
    }
    bound = _EXACT_KL if lossless else max(_ROUNDED_KL[dtype] for dtype in dtypes)
    kl, top1 = metrics["kl_mean"], metrics["top1_agreement"]
    if not kl < bound:
        findings.add(f"kl_mean is {kl:.3g}, and this recipe promises less than {bound:g}")
    # Among few tokens a single near-tie must not decide.
    disagreeing = round((1 - top1) * metrics["tokens"])
    if lossless and top1 < _EXACT_TOP1 and disagreeing > 1:
        findings.add(
            f"top1_agreement is {top1:.4%}, and this recipe promises at least {_EXACT_TOP1:.1%}"
        )
    if lossless:
        return "The same function, as this recipe promises."
    return "The same function up to the rounding of the scaled weights, as this recipe promises."


def _judge_approximate(facts: Facts, metrics: Mapping[str, float], findings: Findings) -> str:
    std = facts.logit_std
    # Whatever the routers turn out to be, no error larger than the ceiling's was promised.
    bound = 30 * min(std, APPROXIMATE_LOGIT_STD) ** 2 + 1e-4
    kl, split = metrics["kl_mean_whole"], metrics["split_token_layers"]
    if not std <= 2 * APPROXIMATE_LOGIT_STD:  # a small router's sample is not its nominal value
        findings.add(
            f"the router's logits have a standard deviation of {std:.3g}, and this recipe "
            f"promises something up to {APPROXIMATE_LOGIT_STD:g}"
        )
    if not kl <= bound:
        findings.add(
            f"kl_mean_whole is {kl:.3g}, and with router logits of standard deviation {std:.3g} "
            f"this recipe promises at most {bound:.3g}"
        )
    if not split < _MOST_SPLIT:
        findings.add(
            f"split_token_layers is {split:.3g}: that share of tokens and layers chose experts "
            f"that are not whole groups, and less than {_MOST_SPLIT:g} is expected"
        )
    return (
        "The same function up to an error of the order of the router's logits "
        f"(measured standard deviation {std:.3g}), as this recipe promises."
    )
