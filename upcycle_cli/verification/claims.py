"""Claims: does `upcycle.json` tell the truth, and do both directories read text alike?

What no comparison with the dense model can see is checked here. With gates that sum to 1, another
top-k or another random router computes the same function; a changed tokenizer changes no weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

from upcycle_cli.checkpoint import CONFIG_NAME, RECORD_NAME
from upcycle_cli.verification.facts import (
    MATRICES,
    Facts,
    RecipeClaim,
    Record,
    read_tensors,
)
from upcycle_cli.verification.models import (
    TransformersError,
    load_tokenizer,
    tokenizer_files,
    transformers_says,
)
from upcycle_cli.verification.report import CheckResult, Findings, Status
from upcycle_cli.verification.weights import recover_factors

NAME = "claims"
_GENERATION_NAME = "generation_config.json"
_STD_RATIO = 2.0  # a small router's sample says no more about what it was drawn with
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "Zażółć gęślą jaźń; Ünïcödé naïveté, 你好，世界, Привет, שלום, नमस्ते.",
    "Emoji: 🙂 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 and a zero-width\u200bspace.",
    "def f(x: int) -> int:\n\treturn x ** 2  # squared\n\n\nprint(f(3))\r\n",
    "   leading, trailing and    inner spaces   ",
)


def check_claims(facts: Facts) -> CheckResult:
    """Check `upcycle.json` against config.json, the tensors, the dense model and the tokenizers."""
    if facts.record is None:
        return CheckResult(
            name=NAME,
            status=Status.SKIPPED,
            detail=f"Not run: there is no {RECORD_NAME}, so nothing is claimed.",
        )
    findings = Findings()
    for failure in (
        *facts.record.problems,
        *_recipe_failures(facts, facts.record),
        *_factor_failures(facts, facts.record),
        *_router_failures(facts, facts.record),
        *_logit_std_failures(facts, facts.record),
        *_option_failures(facts, facts.record),
        *_source_failures(facts, facts.record),
        *_parameter_failures(facts, facts.record),
        *_generation_failures(facts),
    ):
        findings.add(failure)
    note = _compare_tokenizers(facts, findings)
    passed = (
        f"{RECORD_NAME} agrees with config.json, the tensors and the dense model: recipe "
        f"{facts.recipe.routing}, factors, layout, dtype and router digests."
    )
    return findings.result(NAME, passed, {"routers": facts.num_layers}, note)


def _recipe_failures(facts: Facts, record: Record) -> Iterator[str]:
    for key, found in (
        ("source_type", facts.dense.config["model_type"]),
        ("target_type", facts.target.model_type),
    ):
        if record.data.get(key) != found:
            yield f"{RECORD_NAME}: {key} is {record.data.get(key)!r}, config.json says {found}"
    recipe = record.recipe
    if recipe is None:
        return
    keys = facts.target.keys
    routing_key = keys.norm_topk_prob or "routing"
    for label, key, recorded, configured in (
        ("expansion x granularity", keys.num_experts, recipe.num_experts, facts.num_experts),
        ("granularity", keys.expert_size, recipe.granularity, facts.granularity),
        ("top-k", keys.top_k, recipe.top_k, facts.top_k),
        ("routing", routing_key, recipe.routing, facts.routing),
    ):
        if recorded != configured:
            yield (
                f"{CONFIG_NAME}: {key} stands for {label} {configured}, "
                f"{RECORD_NAME} records {recorded}"
            )
    name = f"E{recipe.expansion}G{recipe.granularity}T{recipe.top_k}"
    if record.data["recipe"].get("name", name) != name:
        yield f"{RECORD_NAME}: recipe.name is {record.data['recipe']['name']!r}, not {name}"
    promise = record.data.get("promise", str(recipe.promise))
    if promise != str(recipe.promise):
        yield f"{RECORD_NAME}: promise is {promise!r}, the recipe's is {recipe.promise}"


def _factor_failures(facts: Facts, record: Record) -> Iterator[str]:
    recorded: dict[str, float] = {}
    for key in ("c", *MATRICES):
        value = record.factor(key)
        if value is None:
            yield f"{RECORD_NAME}: factors.{key} is missing or not a positive number"
            return
        recorded[key] = value
    if record.recipe is not None:
        yield from _formula_failures(record.recipe, recorded)
    measured = recover_factors(facts)
    for matrix in MATRICES:
        if math.isnan(measured[matrix]):
            yield f"the factor of {matrix} cannot be recovered from the tensors"
        elif not math.isclose(recorded[matrix], measured[matrix], rel_tol=1e-6):
            yield (
                f"{RECORD_NAME}: factors.{matrix} is {recorded[matrix]:.7g}, "
                f"the tensors were multiplied by {measured[matrix]:.7g}"
            )


def _formula_failures(recipe: RecipeClaim, recorded: dict[str, float]) -> Iterator[str]:
    if not math.isclose(recorded["c"], recipe.claimed_c, rel_tol=1e-6):
        yield (
            f"{RECORD_NAME}: factors.c is {recorded['c']:.7g}, its recipe makes it "
            f"{recipe.claimed_c:.7g}"
        )
    failure = recipe.scaling_failure(recorded, recipe.needed_c, "the recorded recipe")
    if failure is not None:
        yield f"{RECORD_NAME}: {failure}"
    named = recipe.scaling in ("paper", "none")
    if recipe.scale_split == "down" and not named and recorded["up"] != 1.0:
        yield f"{RECORD_NAME}: scale_split is down, but factors.up is {recorded['up']:.7g}"


def _router_failures(facts: Facts, record: Record) -> Iterator[str]:
    digests = record.data.get("routers")
    if not isinstance(digests, dict):
        yield f"{RECORD_NAME}: routers is missing"
        return
    names = [facts.router_name(layer) for layer in range(facts.num_layers)]
    for name in digests:
        if name not in names:
            yield f"{RECORD_NAME}: routers has {name}, which is no router of this model"
    for name in names:
        if name not in digests:
            yield f"{RECORD_NAME}: routers lacks {name}"
        elif name not in facts.moe.tensors:
            yield f"{name} is missing"
        elif _digest(facts, name) != digests[name]:
            yield f"{name} is not the router that {RECORD_NAME} records (SHA-256 differs)"


def _logit_std_failures(facts: Facts, record: Record) -> Iterator[str]:
    recorded = None if record.recipe is None else record.recipe.router_logit_std
    measured = facts.logit_std
    # With a single group no logit decides anything; a missing router is another's finding.
    if recorded is None or facts.expansion == 1 or math.isnan(measured):
        return
    if not recorded / _STD_RATIO <= measured <= recorded * _STD_RATIO:
        yield (
            f"{RECORD_NAME}: recipe.router_logit_std is {recorded:g}, the routers' logits have a "
            f"standard deviation of {measured:.3g}"
        )


def _digest(facts: Facts, name: str) -> str:
    entry = facts.moe.tensors[name]
    with (facts.moe.path / entry.shard).open("rb") as file:
        file.seek(entry.offset)
        return hashlib.sha256(file.read(entry.nbytes)).hexdigest()


def _option_failures(facts: Facts, record: Record) -> Iterator[str]:
    tied, tied_moe = (
        bool(checkpoint.config.get("tie_word_embeddings", False))
        for checkpoint in (facts.dense, facts.moe)
    )
    untied = record.data.get("untie_embeddings")
    if tied and untied is tied_moe:
        yield f"{RECORD_NAME}: untie_embeddings is {untied}, and so is tie_word_embeddings"
    layout = record.data.get("expert_layout")
    found_layout = "fused" if facts.fused else "per-expert"
    if layout != found_layout:
        yield f"{RECORD_NAME}: expert_layout is {layout!r}, the tensors are {found_layout}"
    dtype = record.data.get("dtype")
    if dtype is None:
        return
    stored = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    if not isinstance(dtype, str) or dtype not in stored:
        yield f"{RECORD_NAME}: dtype {dtype!r} is unknown"
        return
    for key in ("dtype", "torch_dtype"):
        configured = facts.moe.config.get(key)
        if configured not in (None, dtype):
            yield f"{CONFIG_NAME}: {key} is {configured!r}, {RECORD_NAME} records {dtype}"
    for name, entry in facts.moe.tensors.items():
        if entry.dtype != stored[dtype]:
            yield f"{name} is {entry.dtype}, {RECORD_NAME} records {dtype}"


def _source_failures(facts: Facts, record: Record) -> Iterator[str]:
    source = record.data.get("source")
    if not isinstance(source, dict):
        yield f"{RECORD_NAME}: source is missing"
        return
    other = "this MoE was made from another checkpoint"
    if source.get("config_sha256") != facts.dense.config_digest:
        yield f"{other}: source.config_sha256 is not that of {facts.dense.path / CONFIG_NAME}"
    recorded = source.get("files")
    found = [
        {"name": shard.name, "size": shard.size, "header_sha256": shard.digest}
        for shard in facts.dense.shards
    ]
    if recorded != found:
        yield f"{other}: source.files does not describe the weight files of {facts.dense.path}"


def _parameter_failures(facts: Facts, record: Record) -> Iterator[str]:
    recorded = record.data.get("parameters")
    if not isinstance(recorded, dict):
        yield f"{RECORD_NAME}: parameters is missing"
        return
    total, idle = facts.moe.num_parameters, 0
    for layer in range(facts.num_layers):
        names = {
            facts.place(matrix, layer, expert).tensor
            for matrix in MATRICES
            for expert in range(facts.num_experts)
        }
        held = (facts.moe.tensors[name].num_elements for name in names & facts.moe.tensors.keys())
        idle += sum(held) // facts.num_experts * (facts.num_experts - facts.top_k)
    dense = sum(entry.num_elements for entry in read_tensors(facts.dense).values())
    for key, found in (("total", total), ("active", total - idle), ("dense", dense)):
        if recorded.get(key) != found:
            yield (
                f"{RECORD_NAME}: parameters.{key} is {recorded.get(key)!r}, "
                f"{CONFIG_NAME} and the tensors make it {found}"
            )


def _generation_failures(facts: Facts) -> Iterator[str]:
    paths = [checkpoint.path / _GENERATION_NAME for checkpoint in (facts.dense, facts.moe)]
    dense, moe = (path.read_bytes() if path.is_file() else None for path in paths)
    if dense is not None and moe is None:
        yield f"{_GENERATION_NAME} is missing: the dense model has one"
    elif dense is not None and moe != dense:
        yield f"{_GENERATION_NAME} is not the file of the dense model"


def _compare_tokenizers(facts: Facts, findings: Findings) -> str:
    """Note where the tokenizers differ; return a sentence on what was compared."""
    dense_files, moe_files = tokenizer_files(facts.dense), tokenizer_files(facts.moe)
    if not dense_files:
        extra = ", though the MoE has one" if moe_files else ""
        return f"The dense model has no tokenizer{extra}, so none was compared."
    if not moe_files:
        findings.add("the tokenizer is missing: the dense model has one")
        return ""
    try:
        dense = load_tokenizer(facts.dense.path)
    except TransformersError as error:
        _compare_files(facts, dense_files, findings)
        return (
            f"The dense model's tokenizer cannot be loaded here ({error}), so the files were "
            "compared byte by byte."
        )
    try:
        moe = load_tokenizer(facts.moe.path)
        with transformers_says():
            for failure in _tokenizer_failures(dense, moe):
                findings.add(failure)
    except TransformersError as error:
        findings.add(f"the tokenizer of the MoE cannot be used: {error}")
    return "Both tokenizers encode the sample texts to the same ids." if not findings else ""


def _compare_files(facts: Facts, names: tuple[str, ...], findings: Findings) -> None:
    for name in names:
        path = facts.moe.path / name
        if not path.is_file() or path.read_bytes() != (facts.dense.path / name).read_bytes():
            findings.add(f"{name} is not the file of the dense model")


def _tokenizer_failures(dense: Any, moe: Any) -> Iterator[str]:  # noqa: ANN401
    specials = " ".join(str(token) for token in dense.all_special_tokens)
    for text in (*_SAMPLES, f"before {specials} after"):
        ids, moe_ids = (list(tokenizer(text)["input_ids"]) for tokenizer in (dense, moe))
        if ids != moe_ids:
            place = next(
                (i for i, pair in enumerate(zip(ids, moe_ids, strict=False)) if pair[0] != pair[1]),
                min(len(ids), len(moe_ids)),
            )
            yield f"the tokenizers encode {text!r} differently from token {place} on"
    # Samples cannot reach every token.
    if dense.get_vocab() != moe.get_vocab():
        changed = set(dense.get_vocab().items()) ^ set(moe.get_vocab().items())
        yield f"the tokenizers' vocabularies differ, for example at {min(changed)[0]!r}"
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if getattr(dense, key) != getattr(moe, key):
            yield f"{key} is {getattr(moe, key)!r}, in the dense model {getattr(dense, key)!r}"
    if dense.chat_template != moe.chat_template:
        yield "the chat template is not the dense model's"
