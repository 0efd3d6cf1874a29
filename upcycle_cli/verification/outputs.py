"""Outputs: do both models, run by transformers' own code, predict the same next tokens?

Both run in float32 on the same text, the dense model as it was published and once more with its
weights rounded to the MoE's dtypes, which tells the price of the dtype from that of the conversion.
Only one model is in memory at a time. The difference is held to what the MoE owes: nothing beyond
arithmetic, or an error of the order of the router's logits. Where it owes nothing, the difference
is measured, and that is not a pass.

Legend: S positions, V vocabulary, E groups, G shards, N = E·G experts, T top-k.
"""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint import TORCH_DTYPES
from upcycle_cli.errors import UpcycleError
from upcycle_cli.files import open_regular
from upcycle_cli.verification.factors import is_power_of_two, recover_factors
from upcycle_cli.verification.facts import (
    APPROXIMATE_LOGIT_STD,
    MATRICES,
    Facts,
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
from upcycle_cli.verification.routing import Routing, watched_routers

if TYPE_CHECKING:
    import torch

NAME = "outputs"
_FEWEST_TOKENS = 512
_RANDOM_TOKENS = 256
_MOST_PROMPT_BYTES = 1_000_000
_CHUNK = 64  # positions whose distributions are in memory in float64 at once

_EXACT_KL = 1e-8
_ROUNDED_KL = {"BF16": 1e-3, "F16": 1e-4, "F32": 1e-8}
_EXACT_TOP1 = 0.999
_MOST_ROUNDING_KL = 1e-2
_MOST_SPLIT = 1e-2
_MOST_SPLIT_EXACT = 1e-3
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class _Prompt:
    """Token ids of shape (1, S), and where they come from, for a person."""

    ids: torch.Tensor
    origin: str
    text_tokens: int
    """The first so many are text; others follow, which nobody would write."""


@dataclass(frozen=True)
class _Dense:
    """Logits (S, V) of the dense model as published, and with its weights rounded as the MoE's."""

    published: torch.Tensor
    rounded: torch.Tensor
    largest: float | None
    """The largest output of an expert stored in float16, None when there is none."""

    @property
    def is_rounded(self) -> bool:
        """Whether the MoE's dtypes hold less than the dense model's."""
        return self.rounded is not self.published


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
    loading = loader.take()
    for complaint in (*_odd_dtypes(facts), *loading.complaints):
        findings.add(complaint)
    if findings:
        return findings.result(NAME, "", note="The outputs could not be compared.")
    assert loading.model is not None
    prompt = _prompt(facts, loading.model.config, prompts)
    try:
        # The hooks see what the model really chose, ties in its own arithmetic included.
        with transformers_says(), watched_routers(facts, loading.model) as routing:
            moe_SV = _logits(loading.model, prompt)
        overflows = _float16_overflow(facts, loading.model, prompt)
    except TransformersError as error:
        findings.add(f"transformers could not run the MoE: {error}")
        return findings.result(NAME, "", note="The outputs could not be compared.")
    del loading
    dense = _run_dense(facts, prompt)
    not_finite = list(_not_finite(moe_SV, dense.published))
    if not_finite:
        not_finite += routing.failures
    for failure in (*not_finite, *overflows, *_overflows(dense.largest)):
        findings.add(failure)
    if not_finite:
        return findings.result(NAME, "", {"tokens": prompt.ids.numel()})
    metrics = _measure(dense, moe_SV, prompt, routing.whole_everywhere) | routing.metrics
    if dense.largest is not None:
        metrics["max_expert_output"] = dense.largest
    judgement = _Judgement(facts, metrics, routing, findings)
    return judgement.result(prompt, objection, rounded=dense.is_rounded)


def _odd_dtypes(facts: Facts) -> Iterator[str]:
    for name, entry in facts.moe.tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            yield f"{name} is {entry.dtype}, which no weight is"


def _not_finite(moe_SV: torch.Tensor, dense_SV: torch.Tensor) -> Iterator[str]:
    for who, logits in (("MoE", moe_SV), ("dense model", dense_SV)):
        bad = int((~logits.isfinite()).sum())
        if bad:
            yield f"{bad} of {logits.numel()} logits of the {who} are not finite"


def _float16_overflow(facts: Facts, model: Any, prompt: _Prompt) -> tuple[str, ...]:  # noqa: ANN401
    """Run a model that is stored in float16 in it; the model is no good for anything else then."""
    if "F16" not in {entry.dtype for entry in facts.moe.tensors.values()}:
        return ()
    with transformers_says():
        bad = int((~_logits(model.half(), prompt).isfinite()).sum())
    if not bad:
        return ()
    return (
        f"run in float16, as it is stored, {bad} logits of the MoE are not finite; convert to "
        "bfloat16 or float32 instead",
    )


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
        with open_regular(path) as file:
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
    """Return text, where there is a tokenizer for it, and random tokens of the whole vocabulary.

    Text shows little of what a model does: a router can be made to fit the built-in one alone.
    Which tokens are drawn depends on the routers, so that these cannot be made to fit them.
    """
    import torch

    longest = min(MOST_TOKENS, getattr(config, "max_position_embeddings", None) or MOST_TOKENS)
    vocab_size: int = config.vocab_size
    reason = "the dense model has no tokenizer"
    text: list[int] = []
    if tokenizer_files(facts.dense):
        words = _builtin_text() if prompts is None else read_prompts(prompts)
        try:
            tokenizer = load_tokenizer(facts.dense.path)
            with transformers_says():
                text = list(tokenizer(words)["input_ids"])
        except TransformersError as error:
            reason = f"the dense model's tokenizer cannot be used ({error})"
        else:
            reason = "the dense model's tokenizer makes no ids, or some beyond its vocabulary"
            text = text if text and max(text) < vocab_size else []
    if not text and prompts is not None:
        raise UpcycleError(
            f"the prompts {prompts} cannot be used: {reason}.",
            "Without --prompts, random tokens are used.",
        )
    count = min(_RANDOM_TOKENS, max(1, longest // 4)) if text else min(_FEWEST_TOKENS, longest)
    drawn = torch.randint(vocab_size, (count,), generator=_generator(facts)).tolist()
    if not text:
        return _Prompt(
            torch.tensor([drawn]), f"{count} random tokens, since {reason}", text_tokens=count
        )
    repeats = math.ceil(_FEWEST_TOKENS / len(text))
    text = (text * repeats)[: longest - count]
    source = "built-in English text" if prompts is None else f"the text of {prompts.name}"
    again = ", repeated" if repeats > 1 else ""
    origin = f"{len(text)} tokens of {source}{again}, and {count} random ones"
    return _Prompt(torch.tensor([text + drawn]), origin, text_tokens=len(text))


def _generator(facts: Facts) -> torch.Generator:
    import torch

    digest = hashlib.sha256()
    with facts.moe.reader() as moe:
        for layer in range(facts.num_layers):
            digest.update(moe.mapped(facts.router_name(layer)))
    seed = int.from_bytes(digest.digest()[:8], "little") >> 1  # torch takes 63 bits
    return torch.Generator().manual_seed(seed)


def _builtin_text() -> str:
    return (files("upcycle_cli.verification") / "prompts.txt").read_text(encoding="utf-8")


def _run_dense(facts: Facts, prompt: _Prompt) -> _Dense:
    import torch

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


def _round(facts: Facts, model: Any) -> bool:  # noqa: ANN401
    """Round a dense model's weights to the MoE's dtypes; return whether that changed any."""
    import torch

    changed = False
    for name, parameter in model.named_parameters():
        rounded = parameter.data.to(_moe_dtype(facts, name)).float()
        changed = changed or not torch.equal(rounded, parameter.data)
        parameter.data = rounded
    return changed


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


def _measure(
    dense: _Dense, moe_SV: torch.Tensor, prompt: _Prompt, whole_S: torch.Tensor
) -> dict[str, float]:
    """Return the metrics of the comparison; KL is KL(dense ‖ MoE) in nats per token.

    NLL is of the text alone.

    Both models are also compared with the dense one whose weights are rounded as the MoE's are:
    what is between the two dense ones is the price of the dtype, and the rest the conversion's.
    """
    import torch

    kl: dict[str, list[torch.Tensor]] = {"": [], "_rounding": [], "_conversion": []}
    gap = dense_nll = moe_nll = 0.0
    ids, text = prompt.ids[0], prompt.ids[0][: prompt.text_tokens]
    for begin in range(0, len(ids), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        logits = [held[rows].double() for held in (dense.published, dense.rounded, moe_SV)]
        gap = max(gap, float((logits[0] - logits[2]).abs().max()))
        published, rounded, moe = (held.log_softmax(-1) for held in logits)
        for key, log_p, log_q in (
            ("", published, moe),
            ("_rounding", published, rounded),
            ("_conversion", rounded, moe),
        ):
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


@dataclass(frozen=True)
class _Judgement:
    """Holds what was measured against what the MoE owes the dense model."""

    facts: Facts
    metrics: Mapping[str, float]
    routing: Routing
    findings: Findings

    def result(self, prompt: _Prompt, objection: str | None, *, rounded: bool) -> CheckResult:
        """Return the check's result."""
        metrics, findings = self.metrics, self.findings
        measured = (
            f"On {prompt.origin}: mean KL {metrics['kl_mean']:.2g}, "
            f"top-1 agreement {metrics['top1_agreement']:.2%}, "
            f"NLL of the text {metrics['moe_nll']:.4f} against {metrics['dense_nll']:.4f} for the "
            "dense model. "
        )
        if rounded:
            measured += (
                f"Rounding its weights alone costs a mean KL of {metrics['kl_mean_rounding']:.2g}. "
            )
        measured += (
            f"Groups stayed whole in {1 - metrics['split_token_layers']:.2%} of tokens and layers; "
            f"expert load varies by {metrics['expert_load_cv']:.2f} (standard deviation / mean)."
        )
        if objection is not None:
            detail = f"Measured only, since this MoE does not promise equality: {objection}."
            note = measured if findings else ""
            result = findings.result(NAME, f"{detail} {measured}", metrics, note)
            return result if findings else replace(result, status=Status.MEASURED)
        promised = self._approximate() if not self.facts.standard.uniform else self._exact()
        self._rounding()
        for failure in self.routing.failures:
            findings.add(failure)
        return findings.result(
            NAME, f"{promised} {measured}", metrics, measured if findings else ""
        )

    def _rounding(self) -> None:
        """Hold what the dtype costs against what a dtype may cost."""
        cost = self.metrics["kl_mean_rounding"]
        if not cost <= _MOST_ROUNDING_KL:
            self.findings.add(
                f"kl_mean_rounding is {cost:.3g}: rounding the dense weights to the MoE's dtypes "
                f"costs more than {_MOST_ROUNDING_KL:g}; convert to another dtype"
            )

    def _exact(self) -> str:
        facts, metrics, findings = self.facts, self.metrics, self.findings
        lossless = all(map(is_power_of_two, recover_factors(facts).values()))
        dtypes = {
            facts.moe.tensors[facts.place(matrix, layer, 0).tensor].dtype
            for layer in range(facts.num_layers)
            for matrix in MATRICES
        }
        bound = _EXACT_KL if lossless else max(_ROUNDED_KL[dtype] for dtype in dtypes)
        kl, top1 = metrics["kl_mean_conversion"], metrics["top1_agreement_conversion"]
        if not kl < bound:
            findings.add(f"kl_mean_conversion is {kl:.3g}, and less than {bound:g} is promised")
        # Among few tokens a single near-tie must not decide.
        disagreeing = round((1 - top1) * metrics["tokens"])
        if lossless and top1 < _EXACT_TOP1 and disagreeing > 1:
            findings.add(
                f"top1_agreement_conversion is {top1:.4%}, and at least {_EXACT_TOP1:.1%} is "
                "promised"
            )
        if facts.granularity > 1:
            self._whole_groups(_MOST_SPLIT_EXACT)
        if lossless:
            return "The same function."
        return "The same function up to the rounding of the scaled weights."

    def _approximate(self) -> str:
        std = self.facts.logit_std
        # Whatever the routers turn out to be, no error larger than the ceiling's was promised.
        bound = 30 * min(std, APPROXIMATE_LOGIT_STD) ** 2 + 1e-4
        kl = self.metrics["kl_mean_whole"]
        if not kl <= bound:
            self.findings.add(
                f"kl_mean_whole is {kl:.3g}, and with router logits of standard deviation "
                f"{std:.3g} at most {bound:.3g} is promised"
            )
        self._whole_groups(_MOST_SPLIT)
        return (
            "The same function up to an error of the order of the router's logits "
            f"(standard deviation {std:.3g})."
        )

    def _whole_groups(self, most: float) -> None:
        split = self.metrics["split_token_layers"]
        if not split < most:
            self.findings.add(
                f"split_token_layers is {split:.3g}: that share of tokens and layers chose experts "
                f"that are not whole groups, and less than {most:g} is expected"
            )
