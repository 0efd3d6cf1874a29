"""What is promised of every model type and every target it can have, the rows of the tables.

A new row is tested here without another line. Models have random weights large enough for every
part to matter; both are run by transformers' own code, or by the code that is shipped with a model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from conftest import SIZES, MakeDense, clone, random_ids, read_json, read_tensors, sizes_of
from conftest import logits as logits_of
from safetensors.torch import save_file

from upcycle_cli import (
    Options,
    Recipe,
    UpcycleError,
    build_plan,
    convert,
    inspect,
    open_checkpoint,
    verify,
)
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TensorEntry
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseFamily
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.families import targets_of
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.shipped_row import shipped
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.headers import geometry_failures
from upcycle_cli.old_verification.sizes import gather_facts
from upcycle_cli.plan.expressions import Halves, Source, Zeros
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.recipe.recipe import SHIPPED, Routing, parse_recipe_name
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import CHECK_NAMES, Report, Status

Row = tuple[str, str]
ROWS: list[Row] = [(name, target) for name in SIZES for target in targets_of(DENSE[name])]
ROWS += [
    (next(name for name, row in DENSE.items() if target in row.targets), target)
    for target in NATIVE
    if target not in {target for _, target in ROWS}
]
"""What grids of recipes, routings and damages are run on: every target, and families that differ
in kind. Of the others, each is converted once, to the shipped code, and to what else it can be."""
OTHERS = [name for name, row in DENSE.items() if name not in SIZES and row.classes]
NATIVE_OTHERS = [
    (name, target)
    for name, row in DENSE.items()
    for target in row.targets
    if (name, target) not in ROWS
]
WINDOW_KEYS = ("sliding_window", "window_size", "keep_window_size", "local_attention")
RECIPES = ("E2G2T2", "E4G2T4", "E2G3T3")
FEW = TextOptions(tokens=64)
UNRECORDED = ("directory", "weights", "outputs")
SINGLE = 1e-5
DOUBLE = 1e-12

each_row = pytest.mark.parametrize("row", ROWS, ids="-".join)


def target_row(model_type: str, target: str) -> Target:
    if target != SHIPPED:
        return NATIVE[target]
    return shipped(DENSE[model_type], "silu", biased=False)


ROUTED = [(row, routing) for row in ROWS for routing in target_row(*row).routings]


def in_words(value: object) -> str:
    return "-".join(value) if isinstance(value, tuple) else str(value)


def recipe(name: str, routing: Routing | None = None, **settings: Any) -> Recipe:  # noqa: ANN401
    """A recipe of a name; with softmax-topk one that is exact, since all experts are chosen."""
    expansion, granularity, top_k = parse_recipe_name(name)
    if routing is Routing.SOFTMAX_TOPK:
        top_k = expansion * granularity
    return Recipe(
        expansion=expansion, granularity=granularity, top_k=top_k, routing=routing, **settings
    )


def exact_routing(row: Row) -> Routing:
    """The first routing whose gates sum to 1, which no router can spoil."""
    return next(r for r in target_row(*row).routings if r is not Routing.SOFTMAX_TOPK)


def assert_passed(report: Report) -> None:
    """Every check has run, and found nothing."""
    assert [check.status for check in report.checks] == [Status.PASSED] * len(CHECK_NAMES), report


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


class MakeMoe(Protocol):
    """Converts the dense model of a row, once per set of arguments. Read only: it is shared."""

    def __call__(
        self,
        row: Row,
        name: str = "E2G2T2",
        routing: Routing | None = None,
        **config: Any,  # noqa: ANN401 - JSON values
    ) -> tuple[Path, Path]: ...


@pytest.fixture(scope="module")
def make_moe(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> MakeMoe:
    made: dict[str, Path] = {}

    def make(
        row: Row,
        name: str = "E2G2T2",
        routing: Routing | None = None,
        **config: Any,  # noqa: ANN401
    ) -> tuple[Path, Path]:
        model_type, target = row
        dense = make_dense(model_type, **config)
        routing = routing or exact_routing(row)
        key = repr((row, name, routing, sorted(config.items())))
        if key not in made:
            # transformers tells shipped code apart by the last name of its path.
            made[key] = tmp_path_factory.mktemp(f"{model_type}_{target}") / f"moe{len(made)}"
            convert(dense, made[key], recipe(name, routing), target=target)
        return dense, made[key]

    return make


@pytest.fixture(autouse=True, scope="module")
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of shipped code that transformers makes and imports are these tests' alone."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield


@contextmanager
def as_a_stranger() -> Iterator[None]:
    """Let transformers take shipped code from the model: verify has told it of ours."""
    from transformers.models.auto import configuration_auto, modeling_auto

    with pytest.MonkeyPatch.context() as patch:
        for mapping in (
            configuration_auto.CONFIG_MAPPING,
            modeling_auto.MODEL_MAPPING,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        ):
            patch.setattr(mapping, "_extra_content", {})
        yield


def logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with as_a_stranger():
        return logits_of(path, ids, dtype)


@pytest.fixture(scope="module")
def dense_logits() -> Callable[..., torch.Tensor]:
    """The logits of a dense model, which are wanted many times."""
    known: dict[tuple[Path, torch.dtype], torch.Tensor] = {}

    def run(dense: Path, dtype: torch.dtype) -> torch.Tensor:
        if (dense, dtype) not in known:
            known[dense, dtype] = logits(dense, random_ids(), dtype)
        return known[dense, dtype]

    return run


# The function ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("row", "routing"), ROUTED, ids=in_words)
def test_the_logits_are_those_of_the_dense_model(
    make_moe: MakeMoe,
    dense_logits: Callable[..., torch.Tensor],
    row: Row,
    routing: Routing,
    name: str,
) -> None:
    dense, moe = make_moe(row, name, routing)
    found = logits(moe, random_ids(), torch.float32)
    assert difference(found, dense_logits(dense, torch.float32)) < SINGLE


@pytest.mark.parametrize(
    ("row", "routing"), [pair for pair in ROUTED if pair[0][1] == SHIPPED], ids=in_words
)
def test_shipped_code_is_exact_in_double_precision(
    make_moe: MakeMoe,
    dense_logits: Callable[..., torch.Tensor],
    row: Row,
    routing: Routing,
) -> None:
    dense, moe = make_moe(row, "E4G2T4", routing)
    found = logits(moe, random_ids(), torch.float64)
    assert difference(found, dense_logits(dense, torch.float64)) < DOUBLE


@each_row
def test_a_config_that_leaves_out_what_is_usual(
    make_moe: MakeMoe, dense_logits: Callable[..., torch.Tensor], row: Row
) -> None:
    dense, moe = make_moe(row, minimal=True)
    full, _ = make_moe(row)
    keys = [read_json(path / "config.json").keys() for path in (dense, full)]
    assert keys[0] < keys[1]
    wanted = dense_logits(full, torch.float32)
    assert torch.equal(dense_logits(dense, torch.float32), wanted)
    assert difference(logits(moe, random_ids(), torch.float32), wanted) < SINGLE


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_family_by_its_row(
    make_moe: MakeMoe, dense_logits: Callable[..., torch.Tensor], model_type: str
) -> None:
    """The logits are the dense model's, verify passes, and finds a row that says something else."""
    dense, moe = make_moe((model_type, SHIPPED))
    wanted = dense_logits(dense, torch.float32)
    assert difference(logits(moe, random_ids(), torch.float32), wanted) < SINGLE
    report = verify(dense, moe, texts=FEW)
    assert_passed(report)
    row = DENSE[model_type]
    for changed in others_of(row):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(DENSE, model_type, changed)
            assert is_refused(dense, moe), changed


SLIDES: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True}
KINDS: Sequence[tuple[str, dict[str, Any]]] = (
    ("arcee", {"mlp_bias": True}),
    ("cohere", {"use_qk_norm": True, "logit_scale": 0.5}),
    ("doge", {"keep_window_size": 8}),
    ("doge", {"sliding_window": 8}),
    ("exaone4", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4_text", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
    ("gpt2", {"n_inner": 80, "tie_word_embeddings": False}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_bias": True}),
    ("hyperclovax", {"attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    ("lfm2", {"block_auto_adjust_ff_dim": False}),
    ("minicpm3", {"scale_emb": 3, "scale_depth": 1.4}),
    ("ministral3", {"sliding_window": 8}),
    ("modernbert-decoder", {"mlp_bias": True, "attention_bias": True, "norm_bias": True}),
    ("olmo", {"clip_qkv": 0.5}),
    ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("phi3", {"sliding_window": 8}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("smollm3", {**SLIDES, "layer_types": ["sliding_attention", "full_attention"]}),
    ("stablelm", {"use_parallel_residual": True}),
    ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    ("starcoder2", {"sliding_window": 8}),
    ("vaultgemma", {"attn_logit_softcapping": 2.0, "tie_word_embeddings": False}),
)
"""Other kinds of a type, by their configs: another block, a cap, a multiplier, other positions."""


YARN = {
    "rope_type": "yarn",
    "rope_theta": 99.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
NATIVE_KINDS: Sequence[tuple[Row, dict[str, Any]]] = (
    (("glm", "glm4_moe"), {"attention_bias": False, "head_dim": 16}),
    (("glm", "glm4_moe"), {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 99.0}}),
    (("granite_swa", "granitemoe_swa"), {"layer_rope_theta": [0, 99.0]}),
    (("phi3", "mixtral"), {"sliding_window": 8, "num_key_value_heads": 4}),
    (("qwen3", "dots1"), {"attention_bias": True}),
    (("qwen3", "mellum"), {"attention_bias": True, "rope_parameters": YARN, **SLIDES}),
    (
        ("youtu", "deepseek_v3"),
        {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
    ),
    (("youtu", "deepseek_v3"), {"rope_parameters": YARN}),
)


@pytest.mark.parametrize(
    ("row", "config"),
    [*(((name, SHIPPED), config) for name, config in KINDS), *NATIVE_KINDS],
    ids=str,
)
def test_other_kinds_of_a_family(make_moe: MakeMoe, row: Row, config: dict[str, Any]) -> None:
    dense, moe = make_moe(row, **config)
    ids = random_ids(40)
    wanted = logits(dense, ids, torch.float32)
    assert difference(logits(moe, ids, torch.float32), wanted) < SINGLE
    # They are another kind indeed.
    usual = logits(make_moe(row)[0], ids, torch.float32)
    assert difference(usual, wanted) > 1e-3
    report = verify(dense, moe, texts=FEW)
    assert_passed(report)


@pytest.mark.parametrize(
    ("row", "routing"),
    [(row, routing) for row in NATIVE_OTHERS for routing in target_row(*row).routings],
    ids=in_words,
)
def test_a_native_target_by_its_row(
    make_moe: MakeMoe,
    dense_logits: Callable[..., torch.Tensor],
    row: Row,
    routing: Routing,
) -> None:
    for config in ({}, {"minimal": True}):
        dense, moe = make_moe(row, "E2G2T2", routing, **config)
        wanted = dense_logits(dense, torch.float32)
        assert difference(logits(moe, random_ids(), torch.float32), wanted) < SINGLE
        assert_passed(verify(dense, moe, texts=FEW))


PIECED = [row for row in NATIVE_OTHERS if DENSE[row[0]].pieces]


@pytest.mark.parametrize("row", PIECED, ids="-".join)
def test_tensors_that_a_target_holds_in_another_form(
    make_dense: MakeDense, tmp_path: Path, row: Row
) -> None:
    """Rounded, in layers that stay dense, in several files, and saved again by transformers."""
    from transformers import AutoModelForCausalLM

    model_type, target = row
    dense, some = make_dense(model_type), target_row(*row).layers.objection((1,), 2) is None
    wanted = recipe("E2G2T2", layers="1" if some else None)
    options = Options(dtype="bfloat16", max_shard_bytes=20_000)
    moe = convert(dense, tmp_path / "moe", wanted, target=target, options=options).output
    report = verify(dense, moe, texts=FEW)
    assert report.passed, report
    AutoModelForCausalLM.from_pretrained(moe, dtype="auto").save_pretrained(tmp_path / "again")
    report = verify(dense, tmp_path / "again", checks=UNRECORDED, texts=FEW)
    assert report.passed, report


@pytest.mark.parametrize("row", PIECED, ids="-".join)
def test_damage_to_tensors_in_another_form_is_noticed(
    make_dense: MakeDense, tmp_path: Path, row: Row
) -> None:
    dense, some = make_dense(row[0]), target_row(*row).layers.objection((1,), 2) is None
    wanted = recipe("E2G2T2", layers="1" if some else None)
    plan = build_plan(wanted, open_checkpoint(dense), target=row[1])
    moe = convert(dense, tmp_path / "moe", wanted, target=row[1]).output
    assert verify(dense, moe, checks=["weights"]).accepted
    changed = [tensor for tensor in plan.tensors if made_of_rows(tensor) and tensor.layer == 0]
    listed = (piece.name for pieces in DENSE[row[0]].pieces.values() for piece in pieces)
    skipped = () if some else ("mlp.",)
    assert {tensor.name.partition(".0.")[2] for tensor in changed} == {
        name for name in listed if not name.startswith(skipped)
    }
    checkpoint = open_checkpoint(moe)
    for tensor in changed:
        flip_in(checkpoint, tensor)
        assert not verify(dense, moe, checks=["weights"]).accepted, tensor.name
        flip_in(checkpoint, tensor)  # and back
    # Every number is there, but in the dense model's order.
    content = read_tensors(moe)
    for tensor in changed:
        if isinstance(tensor.expr, Halves):
            content[tensor.name] = read_tensors(dense)[tensor.name]
        elif tensor.name.endswith("k_proj.weight"):  # v is of the same shape
            content[tensor.name] = content[tensor.name.replace(".k_", ".v_")].clone()
    save_file(content, moe / "model.safetensors", metadata={"format": "pt"})
    for check in ("directory", "weights", "outputs"):
        # Of settings, nothing was changed.
        assert verify(dense, moe, checks=[check]).passed is (check == "structure")


def made_of_rows(tensor: OutputTensor) -> bool:
    return tensor.role is Role.COPIED and not isinstance(tensor.expr, Source)


def is_refused(dense: Path, moe: Path) -> bool:
    try:
        return not verify(dense, moe, checks=["directory"]).accepted
    except UpcycleError:
        return True


def others_of(row: DenseFamily) -> Iterator[DenseFamily]:
    """A row with another norm before the MLP, and with another offset of it."""
    yield replace(row, norm="input_layernorm.weight" if row.norm is None else None)
    if row.norm is not None:
        yield replace(row, norm_offset=1.0 - row.norm_offset)


WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen2": {**SLIDES, "max_window_layers": 1},
    "qwen3": {**SLIDES, "max_window_layers": 0},
}
WINDOWED = [row for row in ROWS if row[0] in WINDOWS and row[1] not in ("glm4_moe", "hy_v3")]


@pytest.mark.parametrize("row", WINDOWED, ids="-".join)
def test_a_text_longer_than_the_windows(make_moe: MakeMoe, row: Row) -> None:
    dense, moe = make_moe(row, **WINDOWS[row[0]])
    ids = random_ids(40)
    wanted = logits(dense, ids, torch.float32)
    # The window is what makes these logits.
    assert difference(logits(make_moe(row)[0], ids, torch.float32), wanted) > 1e-2
    assert difference(logits(moe, ids, torch.float32), wanted) < SINGLE


def test_every_row_with_windows_is_tried() -> None:
    """Texts are longer than 8 tokens, which are the window of tiny models whose type has one."""
    windowed = {name for name in DENSE if defaults_of(name).keys() & {*WINDOW_KEYS}}
    tried = {name for name, config in (*KINDS, *WINDOWS.items()) if config.keys() & {*WINDOW_KEYS}}
    tried |= {name for name in OTHERS if sizes_of(name).keys() & {*WINDOW_KEYS}}
    assert windowed - tried == {"nemotron_h"}  # whose window no layer of transformers reads


# The table ---------------------------------------------------------------------------------------


def facts_of(dense: Path, moe: Path) -> Facts:
    return gather_facts(
        open_checkpoint(dense), open_checkpoint(moe), moe_names=(), allow_inexact=False
    )


@each_row
def test_the_rows_have_the_geometry_of_transformers(make_moe: MakeMoe, row: Row) -> None:
    for routing in target_row(*row).routings:
        assert list(geometry_failures(facts_of(*make_moe(row, "E2G2T2", routing)))) == []


@each_row
def test_the_fused_layout_has_it_too(make_dense: MakeDense, tmp_path: Path, row: Row) -> None:
    model_type, target = row
    dense = make_dense(model_type)
    for layout in target_row(*row).layouts:
        options = Options(expert_layout=layout)
        convert(dense, tmp_path / layout, recipe("E2G2T2"), target=target, options=options)
        assert list(geometry_failures(facts_of(dense, tmp_path / layout))) == []
        assert verify(dense, tmp_path / layout, checks=["directory", "weights"]).accepted


# Damage ------------------------------------------------------------------------------------------

DRAWN = (Role.SHARED_EXPERT,)
"""Tensors that are free within bounds: only what is out of bounds is damage."""


def damaging_settings(row: Row) -> dict[str, Any]:
    """Settings that make the MoE of a row have as many kinds of tensors as it can have."""
    model_type, target = row
    settings: dict[str, Any] = {"tie_word_embeddings": True}
    if target == SHIPPED and "mlp_bias" in defaults_of(model_type):
        settings["mlp_bias"] = True
    return settings


def one_of_each(tensors: Iterator[OutputTensor]) -> dict[str, OutputTensor]:
    """The last tensor of each role, and of each kind of an expert's parts."""
    found: dict[str, OutputTensor] = {}
    for tensor in tensors:
        part = "+".join(tensor.holds)
        if tensor.role is Role.SHARED_EXPERT:
            part = tensor.name.rpartition(".shared_expert")[2]
        if tensor.role is Role.ADDED:
            part = tensor.name.partition(".3.")[2]
        found[f"{tensor.role} {part}"] = tensor
    return found


def flip(path: Path, entry: TensorEntry, offset: int, bits: int) -> None:
    """Change one byte of a tensor in its file."""
    content = bytearray(path.read_bytes())
    start = int.from_bytes(content[:8], "little") + 8
    header = read_header(content)
    begin, end = header[entry.name]["data_offsets"]
    place = start + (begin if offset >= 0 else end) + offset
    content[place] ^= bits
    path.write_bytes(content)


def read_header(content: bytearray) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def flip_in(checkpoint: Checkpoint, tensor: OutputTensor) -> None:
    """Spoil one element: its lowest bit, or where values are free its exponent."""
    free = tensor.role in DRAWN and not isinstance(tensor.expr, Zeros)
    offset, bits = (-1, 0x40) if free else (-4, 0x01)
    flip(checkpoint.path / "model.safetensors", checkpoint.tensors[tensor.name], offset, bits)


@each_row
def test_one_byte_of_any_kind_of_tensor_is_noticed(
    make_dense: MakeDense, tmp_path: Path, row: Row
) -> None:
    model_type, target = row
    dense = make_dense(model_type, **damaging_settings(row))
    wanted = recipe("E2G2T2", target_row(*row).routings[-1])
    options = Options(untie_embeddings=True)
    plan = build_plan(wanted, open_checkpoint(dense), target=target, options=options)
    moe = convert(dense, tmp_path / "moe", wanted, target=target, options=options).output
    assert verify(dense, moe, checks=["directory", "weights"]).accepted
    kinds = one_of_each(plan.tensors)
    head = "lm_head.weight" not in open_checkpoint(dense).tensors  # nemotron_h ties nothing
    wanted_roles = roles_of(*row) - (set() if head else {Role.HEAD})
    assert {tensor.role for tensor in kinds.values()} == wanted_roles
    checkpoint = open_checkpoint(moe)
    for kind, tensor in kinds.items():
        flip_in(checkpoint, tensor)
        assert not verify(dense, moe, checks=["weights"]).accepted, kind
        flip_in(checkpoint, tensor)  # and back
    assert verify(dense, moe, checks=["weights"]).accepted


def roles_of(model_type: str, target: str) -> set[Role]:
    """What the output of a row consists of, by what the row says."""
    row = target_row(model_type, target)
    roles = {Role.COPIED, Role.ROUTER, Role.EXPERT, Role.HEAD}
    if row.correction_bias is not None:
        roles.add(Role.CORRECTION_BIAS)
    if row.shared is not None and row.shared.required:
        roles.add(Role.SHARED_EXPERT)
    if row.required_biases and model_type != "qwen2":  # which has them all
        roles.add(Role.ZERO_BIAS)
    if row.extra_tensors:
        roles.add(Role.ADDED)
    return roles


# There and back ----------------------------------------------------------------------------------


@each_row
def test_verify_passes_and_again_when_transformers_has_saved_it(
    make_moe: MakeMoe, tmp_path: Path, row: Row
) -> None:
    from transformers import AutoModelForCausalLM

    dense, moe = make_moe(row)
    again = tmp_path / "again"
    code = target_row(*row).ships_code
    with as_a_stranger():
        model = AutoModelForCausalLM.from_pretrained(moe, trust_remote_code=code)
        model.save_pretrained(again)
    report = verify(dense, moe, texts=FEW)
    assert_passed(report)
    found, before = inspect(again), inspect(moe)
    for name in ("model_type", "num_experts", "top_k", "routing", "moe_layers", "num_layers"):
        assert getattr(found, name) == getattr(before, name), name
    report = verify(dense, again, checks=UNRECORDED, texts=FEW)
    assert report.passed, report


@each_row
def test_a_copy_that_nothing_was_done_to_is_as_good(
    make_moe: MakeMoe, tmp_path: Path, row: Row
) -> None:
    """What verify says does not hang on what the converter has written down."""
    dense, moe = make_moe(row)
    bare = clone(moe, tmp_path / "bare")
    (bare / "upcycle.json").unlink()
    report = verify(dense, bare, checks=UNRECORDED, texts=FEW)
    assert report.passed, report
