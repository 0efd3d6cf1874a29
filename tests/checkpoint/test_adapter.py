"""Adapters: the computed model is peft's, and what is more than plain LoRA is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ADAPTER_WEIGHTS, edit_adapter_config, make_adapter
from conftest import MakeDense, clone, read_tensors
from quantised import save_fp8
from safetensors.torch import load_file, save_file
from wrapped import save_wrapper

from upcycle_cli import Growth, UpcycleError, convert
from upcycle_cli.hub.remote_checkpoint import open_source, split_adapter

Tensors = dict[str, torch.Tensor]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT_OF = {
    "llava": "llama",
    **{name: f"{name}_text" for name in ("gemma3", "paddleocr_vl", "qwen2_vl")},
}
PEFT: dict[str, dict[str, Any]] = {
    "all layers": {"target_modules": ALL},
    "of rank 1": {"target_modules": ALL, "r": 1},
    "rank-stabilised": {"target_modules": ALL, "use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {r"layers\.0\.mlp\.(up|gate)_proj": 2, "q_proj": 5},
        "alpha_pattern": {"model.layers.1.self_attn.o_proj": 3, "down_proj": 32},
    },
    "some layers": {"target_modules": ALL, "layers_to_transform": [1]},
    "a pattern of layers": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "whole modules": {"modules_to_save": ["lm_head", "norm"]},
    "the embedding": {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    "in bfloat16": {"target_modules": ALL, "dtype": "bfloat16"},
}


def computed(base: Path, adapter: Path) -> Tensors:
    source = open_source(f"{base}+{adapter}")
    with source.reader() as reader:
        return {name: reader.tensor(name).clone() for name in source.tensors}


def steps_apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many values of the dtype lie between each two."""
    kind = {2: torch.int16, 4: torch.int32}[one.element_size()]
    least = torch.iinfo(kind).min
    bits = [each.contiguous().view(kind).long() for each in (one, other)]
    ordered = [torch.where(each < 0, least - each, each) for each in bits]
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", PEFT)
def test_compute_what_peft_merges(
    make_dense: MakeDense, tmp_path: Path, case: str, dtype: str
) -> None:
    """peft merges in float32. Its sums depend on the BLAS, ours are rounded from the exact ones."""
    base = make_dense("llama", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "lora", **PEFT[case])
    check_against_peft(base, adapter, getattr(torch, dtype))


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("qwen2", {"target_modules": ALL}),
    ],
)
def test_names_and_layouts_of_other_models(
    make_dense: MakeDense, tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    base = make_dense(model_type, dtype="bfloat16")
    adapter = make_adapter(base, tmp_path / "lora", **config)
    check_against_peft(base, adapter, torch.bfloat16)


@pytest.mark.parametrize("wrapper", TEXT_OF)
def test_an_adapter_of_a_model_inside_a_wrapper(tmp_path: Path, wrapper: str) -> None:
    """Adapters have names in memory; released checkpoints of some wrappers have others on disk."""
    base = save_wrapper(tmp_path / "base", wrapper, TEXT_OF[wrapper], {})
    adapter = make_adapter(base, tmp_path / "lora", target_modules=["q_proj", "up_proj"])
    check_against_peft(base, adapter, torch.float32)


def test_a_base_without_the_first_part_of_its_names(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense("gpt2")
    adapter = make_adapter(base, tmp_path / "lora", target_modules=["c_fc"], fan_in_fan_out=True)
    bare = clone(base, tmp_path / "bare")
    held = {name.removeprefix("transformer."): each for name, each in read_tensors(base).items()}
    save_file(held, bare / "model.safetensors", metadata={"format": "pt"})
    found, wanted = computed(bare, adapter), computed(base, adapter)
    assert all(
        torch.equal(found[name.removeprefix("transformer.")], wanted[name]) for name in wanted
    )


def test_an_fp8_base_is_rounded_once(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense("llama", dtype="bfloat16")
    adapter = make_adapter(base, tmp_path / "lora", modules_to_save=["lm_head"])
    quantised = save_fp8(base, tmp_path / "fp8")
    found, held = computed(quantised, adapter), read_tensors(quantised)
    lora, name = load_file(adapter / ADAPTER_WEIGHTS), "model.layers.1.mlp.up_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    scale = held[f"{name}.weight_scale_inv"]
    wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    wanted = held[f"{name}.weight"].float() * wide + (b @ a).float() * 2
    assert torch.equal(found[f"{name}.weight"], wanted.bfloat16())
    twice = (held[f"{name}.weight"].float() * wide).bfloat16().float() + (b @ a).float() * 2
    assert not torch.equal(twice.bfloat16(), wanted.bfloat16())
    assert torch.equal(found["lm_head.weight"], lora["base_model.model.lm_head.weight"].bfloat16())


def test_replace_fp8_weights(make_dense: MakeDense, tmp_path: Path) -> None:
    """Their scales are left out, and the rest is dequantised."""
    base = make_dense("llama", dtype="bfloat16")
    adapter = make_adapter(
        base, tmp_path / "lora", target_modules=["up_proj"], modules_to_save=["down_proj"]
    )
    source = open_source(f"{save_fp8(base, tmp_path / 'fp8')}+{adapter}")
    assert source.tensors.keys() == read_tensors(base).keys()
    name = "model.layers.1.mlp.down_proj.weight"
    assert "replaces" in source.left_out[f"{name}_scale_inv"]
    saved = load_file(adapter / ADAPTER_WEIGHTS)[f"base_model.model.{name}"]
    with source.reader() as reader:
        assert torch.equal(reader.tensor(name), saved.bfloat16())


def check_against_peft(base: Path, adapter: Path, dtype: torch.dtype) -> None:
    plain, merged, ours = read_tensors(base), read_tensors(adapter / "merged"), None
    ours = computed(base, adapter)
    assert ours.keys() == plain.keys()
    changed = [name for name in ours if not torch.equal(ours[name], plain[name])]
    assert changed
    for name, found in ours.items():
        apart = steps_apart(found, merged[name].to(dtype))
        if dtype is torch.bfloat16:  # a sum that lies between two values
            assert apart.max() <= 1
            assert (apart > 0).float().mean() < 1e-3
        else:
            assert torch.allclose(found, merged[name], rtol=1e-6, atol=1e-7)


# Refusals ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(make_dense: MakeDense) -> Path:
    return make_dense("llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "lora")


UP = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"


def of(**changes: object) -> Callable[[Path], None]:
    return lambda path: edit_adapter_config(path, **changes)


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        held = load_file(path / ADAPTER_WEIGHTS)
        change(held)
        save_file(held, path / ADAPTER_WEIGHTS)

    return edit


def added(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return tensors(lambda held: held.update({name: torch.zeros(shape, dtype=dtype)}))


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(held: Tensors) -> None:
        for name in [*held]:
            held[name.replace(old, new)] = held.pop(name)

    return tensors(change)


def pickled(path: Path) -> None:
    (path / ADAPTER_WEIGHTS).rename(path / "adapter_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "DoRA": (of(use_dora=True), ("use_dora is True", "merge_and_unload")),
    "IA3": (of(peft_type="IA3"), ("peft_type is 'IA3'",)),
    "no type": (of(peft_type=None), ("peft_type is None",)),
    "biases": (of(bias="all"), ("bias is 'all'",)),
    "a bias of B": (of(lora_bias=True), ("lora_bias is True",)),
    "PiSSA": (of(init_lora_weights="pissa_niter_4"), ("init_lora_weights is 'pissa_niter_4'",)),
    "some tokens": (of(trainable_token_indices=[1]), ("trainable_token_indices is [1]",)),
    "parameters": (of(target_parameters=["mlp.up"]), ("target_parameters is",)),
    "a new kind": (of(use_next_year=1), ("use_next_year is 1",)),
    "no rank": (of(r=None), ("has rank None",)),
    "rank 0": (of(r=0), ("has rank 0",)),
    "another rank": (of(r=5), ("shapes", "not {'A': (5, 48), 'B': (32, 5)}")),
    "a rank in words": (of(rank_pattern={"up_proj": "4"}), ("has rank '4'",)),
    "an alpha in words": (of(lora_alpha="8"), ("alpha '8'",)),
    "an endless alpha": (of(lora_alpha=math.inf), ("alpha inf",)),
    "a huge alpha": (of(lora_alpha=10**400), ("alpha 1000",)),
    "no alpha": (of(alpha_pattern={".*": math.nan}), ("alpha nan",)),
    "no pattern": (of(rank_pattern={"(": 4}), ("rank_pattern is unusable",)),
    **{
        f"the pattern {slow[:20]}": (of(alpha_pattern={slow: 4}), ("could take for ever",))
        for slow in ("([a-z._0-9]+)+X", "(?:.|[a-z])*X", "a?" * 40 + "X", "(l|l)" * 40, "x|" * 200)
    },
    "no object": (lambda p: (p / "adapter_config.json").write_text("[]"), ("not a JSON object",)),
    "pickle": (pickled, ("has no adapter_model.safetensors", "save_pretrained")),
    "no config": (lambda p: (p / "adapter_config.json").unlink(), ("no adapter_config.json",)),
    "no tensors": (tensors(lambda held: held.clear()), ("has no tensors",)),
    "no B": (
        tensors(lambda held: held.pop(UP.format("B"))),
        ("A and B of model.layers.1.mlp.up_proj", "(4, 32)"),
    ),
    "a missing layer": (
        renamed("layers.1", "layers.7"),
        ("changes model.layers.7.", "does not have"),
    ),
    "another shape": (added(UP.format("B"), 47, 4), ("(47, 4)", "(48, 4)")),
    "integers": (added(UP.format("B"), 48, 4, dtype=torch.int8), ("(I8) is no tensor of",)),
    "no name of peft": (added("model.norm.weight", 32), ("model.norm.weight (F32) is no tensor",)),
    "a magnitude": (
        added(UP.format("magnitude_vector"), 48),
        ("lora_magnitude_vector.weight (F32) is no tensor of plain LoRA",),
    ),
    "more tokens": (
        added("base_model.model.lm_head.weight", 300, 32),
        ("has shape [300, 32], but [260, 32]", "vocabulary was resized"),
    ),
    "twice": (
        tensors(
            lambda held: held.update(
                {
                    UP.format(x).replace("model.layers", "layers"): held[UP.format(x)].clone()
                    for x in "AB"
                }
            )
        ),
        ("layers.1.mlp.up_proj.weight",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuse_what_is_no_plain_lora(base: Path, adapter: Path, tmp_path: Path, case: str) -> None:
    change, words = REFUSED[case]
    shutil.copytree(adapter, tmp_path / "lora")
    change(tmp_path / "lora")
    with pytest.raises(UpcycleError) as caught:
        open_source(f"{base}+{tmp_path / 'lora'}")
    for word in words:
        assert word in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("recipe", ["E2G1T1", Growth(expand=2)])
def test_refuse_a_change_of_a_tied_embedding(
    make_dense: MakeDense, tmp_path: Path, recipe: str | Growth
) -> None:
    tied = make_dense("llama", tie_word_embeddings=True)
    adapter = make_adapter(tied, tmp_path / "lora", target_modules=["embed_tokens"])
    if isinstance(recipe, Growth):
        tied = convert(tied, tmp_path / "small", "E2G1T1").output
    with pytest.raises(UpcycleError, match="share"):
        convert(f"{tied}+{adapter}", tmp_path / "moe", recipe)


def test_refuse_a_base_with_names_of_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Its tensor would be read in place of the adapter's."""
    other, name = clone(base, tmp_path / "base"), UP.format("A")
    held = {**read_tensors(base), f"adapter: {name}": torch.zeros(1)}
    (other / "model.safetensors").unlink()
    save_file(held, other / "model.safetensors")
    with pytest.raises(UpcycleError, match=f"like 'adapter: {name}'"):
        open_source(f"{other}+{adapter}")


def test_refuse_a_base_of_integers(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole = clone(base, tmp_path / "base")
    held = {name: each.to(torch.int8) for name, each in read_tensors(base).items()}
    (whole / "model.safetensors").unlink()
    save_file(held, whole / "model.safetensors")
    with pytest.raises(UpcycleError, match="stores as I8"):
        open_source(f"{whole}+{adapter}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("base+lora", ("base", "lora")),
        ("a+b", ("a+b", None)),
        ("a+b+lora", ("a+b", "lora")),
        ("base+a+b", ("base", "a+b")),
        ("base+org/lora@main", ("base", "org/lora@main")),
        ("org/base@v1+lora", ("org/base@v1", "lora")),
        ("base+absent", ("base", "absent")),
        ("absent+lora", ("absent", "lora")),
        ("absent+missing", ("absent+missing", None)),
        ("base", ("base", None)),
        ("base+", ("base+", None)),
    ],
)
def test_split_base_and_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, parts: tuple[str, str | None]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "lora", "a+b"):
        (tmp_path / name).mkdir()
    assert split_adapter(text) == parts


def test_say_what_is_missing(base: Path, tmp_path: Path) -> None:
    model = clone(base, tmp_path / "model")
    for adapter, words in (
        (tmp_path / "absent", r"absent does not exist\.\nAfter the \+ stands a LoRA adapter"),
        (model, "model has no adapter_config.json"),
        ("", r"\+ does not exist"),
    ):
        with pytest.raises(UpcycleError, match=words):
            open_source(f"{base}+{adapter}")
