"""Models around a text model: what is promised of each, with a picture and a text.

Models are tiny, with random weights large enough for every part to matter, the vision tower's too;
both are run by transformers' own code, or by the code that is shipped with a model.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from conftest import (
    REMOVED,
    SPECIAL,
    TINY,
    MakeDense,
    RunCli,
    clone,
    random_weight,
    read_json,
    read_tensors,
    save_companions,
    validate_json,
    write_json,
)
from safetensors.torch import save_file

from upcycle_cli import Recipe, UpcycleError, build_plan, convert, inspect, open_checkpoint, verify
from upcycle_cli.models.families import native_target, targets_of, wrapped_family
from upcycle_cli.models.wrapper import IN_MEMORY_PREFIXES
from upcycle_cli.models.wrappers import WRAPPERS
from upcycle_cli.old_verification import CHECK_NAMES, Status, TextOptions
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.prompts import make_prompt
from upcycle_cli.old_verification.running import dense_model
from upcycle_cli.old_verification.sizes import gather_facts
from upcycle_cli.recipe.recipe import SHIPPED, Routing

IMAGE, SOUND = 250, 252
_TEXT: Mapping[str, Any] = {
    **TINY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "head_dim": 8,
}
_SEES: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_SEES_PATCHES: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_TOKENS: Mapping[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
_ROPE: Mapping[str, Any] = {
    "rope_type": "default",
    "mrope_section": [1, 1, 2],
    "rope_theta": 10000.0,
}
# What a config says of all but its text model; transformers has a class for each.
AROUND: Mapping[str, dict[str, Any]] = {
    "gemma3": {
        "vision_config": {**_SEES, "model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_index": IMAGE,
        "boi_token_index": 251,
        "eoi_token_index": 252,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "vision_config": {
            **_SEES,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "use_clipped_linears": True,
            "standardize": True,
        },
        "audio_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [8, 4],
            "output_proj_dims": 24,
        },
        "image_token_id": IMAGE,
        "video_token_id": 251,
        "audio_token_id": SOUND,
        "boi_token_id": 253,
        "eoi_token_id": 254,
        "boa_token_id": 255,
        "eoa_token_index": 256,
    },
    "llava": {
        "vision_config": {**_SEES, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "mistral3": {
        "vision_config": {**_SEES, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": IMAGE,
    },
    "qwen2_5_vl": {
        "vision_config": {**_SEES_PATCHES, "window_size": 8, "fullatt_block_indexes": [0]},
        **_TOKENS,
    },
    "qwen3_5": {"vision_config": {**_SEES_PATCHES, "num_position_embeddings": 16}, **_TOKENS},
    "qwen3_vl": {
        "vision_config": {
            **_SEES_PATCHES,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_TOKENS,
    },
}
# What text models need said beside their sizes.
TEXTS: Mapping[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "gemma4_text": {**SPECIAL["gemma4_text"], "sliding_window": 8, "pad_token_id": 0},
    "mistral": {"sliding_window": 8},
    "ministral3": {"max_position_embeddings": 1 << 18},
    "qwen2_5_vl_text": {"rope_parameters": _ROPE},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
    },
    "qwen3_vl_text": {"rope_parameters": _ROPE},
}
SAME = 1e-5

Row = tuple[str, str, str]


def targets(wrapper: str, text: str) -> tuple[str, ...]:
    config = {"model_type": wrapper, "text_config": {"model_type": text}}
    return targets_of(wrapped_family(config, ()))


ROWS: list[Row] = [
    (wrapper, text, target)
    for wrapper, row in WRAPPERS.items()
    for text in row.texts
    for target in targets(wrapper, text)
]


class MakeWrapper(Protocol):
    def __call__(self, wrapper: str, text: str, **around: Any) -> Path: ...  # noqa: ANN401


@pytest.fixture(scope="module")
def make_wrapper(tmp_path_factory: pytest.TempPathFactory) -> MakeWrapper:
    made: dict[str, Path] = {}

    def make(wrapper: str, text: str, **around: Any) -> Path:  # noqa: ANN401
        key = json.dumps([wrapper, text, around])
        if key not in made:
            made[key] = save_wrapper(
                tmp_path_factory.mktemp(wrapper) / "dense", wrapper, text, around
            )
        return made[key]

    return make


def save_wrapper(path: Path, wrapper: str, text: str, around: Mapping[str, Any]) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

    inner = {**_TEXT, **TEXTS.get(text, {}), "model_type": text}
    config = CONFIG_MAPPING[wrapper](**{**AROUND[wrapper], **around, "text_config": inner})
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = random_weight(name, parameter.shape, generator)
    model.config.dtype = torch.float32
    model.save_pretrained(path)
    save_companions(path)
    if wrapper == "qwen3_5":
        # transformers makes this of any tokenizer beside one, so it must be one.
        AutoTokenizer.from_pretrained(path).save_pretrained(path)
    write_json(path / "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]})
    return path


@pytest.fixture(scope="module")
def make_moe(make_wrapper: MakeWrapper, tmp_path_factory: pytest.TempPathFactory) -> MakeMoe:
    made: dict[Row, Path] = {}

    def make(row: Row) -> tuple[Path, Path]:
        wrapper, text, target = row
        dense = make_wrapper(wrapper, text)
        if row not in made:
            # transformers tells shipped code apart by the last name of its path.
            made[row] = tmp_path_factory.mktemp("-".join(row)) / f"wrapped{len(made)}"
            convert(dense, made[row], recipe(row), target=target)
        return dense, made[row]

    return make


MakeMoe = Callable[[Row], tuple[Path, Path]]


@pytest.fixture(autouse=True, scope="module")
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of shipped code that transformers makes and imports are these tests' alone."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield


def failures(dense: Path, moe: Path, checks: Sequence[str] = CHECK_NAMES) -> list[str]:
    """All that verify finds wrong."""
    report = verify(dense, moe, checks=checks)
    assert {check.status for check in report.checks} <= {Status.PASSED, Status.FAILED}
    return [failure for check in report.checks for failure in check.failures]


def recipe(row: Row) -> Recipe:
    """One whose gates sum to 1, which no router can spoil."""
    wrapper, text, target = row
    routing = Routing.TOPK_SOFTMAX
    if target != SHIPPED:
        config = {"model_type": wrapper, "text_config": {"model_type": text}}
        routings = native_target(target, wrapped_family(config, ()).inside).routings
        routing = next(r for r in routings if r is not Routing.SOFTMAX_TOPK)
    return Recipe(expansion=2, granularity=2, top_k=2, routing=routing)


def load(path: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    from transformers import AutoModelForImageTextToText

    code = "auto_map" in read_json(path / "config.json")
    model, info = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, trust_remote_code=code
    )
    assert not {kind: found for kind, found in info.items() if found}
    return model.eval()


@torch.no_grad()
def picture_and_text(model: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """What a processor would make of a picture among words, for any of these models."""
    generator = torch.Generator().manual_seed(5)
    vision, known = model.config.vision_config, signature(type(model.base_model).forward).parameters
    if "image_grid_thw" in known:
        pixels, grid = torch.randn(16, 96, generator=generator), torch.tensor([[1, 4, 4]])
        inputs = {"pixel_values": pixels, "image_grid_thw": grid}
    elif "image_position_ids" in known:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        pixels = torch.randn(1, 16, 48, generator=generator)
        inputs = {"pixel_values": pixels, "image_position_ids": places}
    else:
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
        if vision.model_type == "pixtral":
            inputs["image_sizes"] = torch.tensor([[16, 16]])
    made = model.get_image_features(**inputs, return_dict=True).pooler_output
    count = sum(len(piece.reshape(-1, piece.shape[-1])) for piece in made)
    words = torch.randint(2, IMAGE, (1, 14), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, count), IMAGE), words[:, 4:]], dim=1)
    for key in {"token_type_ids", "mm_token_type_ids"} & {*known}:
        inputs[key] = (ids == IMAGE).long()
    return {"input_ids": ids, **inputs}


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: ANN401
    found: torch.Tensor = model(**inputs).logits
    return found


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_every_row_is_tried() -> None:
    assert WRAPPERS.keys() == AROUND.keys()


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_picture_and_a_text_give_what_they_gave(make_moe: MakeMoe, row: Row) -> None:
    dense, moe = make_moe(row)
    before, after = load(dense), load(moe)
    inputs = picture_and_text(before)
    wanted = logits(before, inputs)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert difference(logits(before, other), wanted) > 1e-2  # it sees the picture
    assert difference(logits(after, inputs), wanted) < SAME
    how = {**inputs, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(after.generate(**how), before.generate(**how))
    assert failures(dense, moe) == []


GEMMA4: Row = ("gemma4", "gemma4_text", SHIPPED)


def test_a_sound_and_a_text_give_what_they_gave(make_moe: MakeMoe) -> None:
    before, after = map(load, make_moe(GEMMA4))
    generator = torch.Generator().manual_seed(6)
    words = torch.randint(2, IMAGE, (1, 14), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, 2), SOUND), words[:, 4:]], dim=1)
    heard = torch.randn(1, 8, 8, generator=generator)  # 8 moments, of which 4 make a token
    inputs = {"input_ids": ids, "input_features": heard}
    inputs["input_features_mask"] = torch.ones(1, 8, dtype=torch.bool)
    wanted = logits(before, inputs)
    assert difference(logits(before, {**inputs, "input_features": -heard}), wanted) > 1e-2
    assert difference(logits(after, inputs), wanted) < SAME


def test_a_wrapper_that_has_one_type_before_and_after(make_moe: MakeMoe, tmp_path: Path) -> None:
    dense, moe = make_moe((*GEMMA4[:2], "gemma4_text"))
    types = [read_json(path / "config.json")["model_type"] for path in (dense, moe)]
    assert types == ["gemma4", "gemma4"]
    assert inspect(dense).targets == ("gemma4_text", SHIPPED)
    assert inspect(moe).moe_layers == (0, 1, 2, 3)
    with pytest.raises(UpcycleError, match="a mixture of experts already"):
        convert(moe, tmp_path / "again", recipe(GEMMA4))


def test_a_shipped_config_can_be_made_of_nothing(make_moe: MakeMoe) -> None:
    """transformers compares with such a one; the text model's own class says null of experts."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(make_moe(GEMMA4)[1], trust_remote_code=True)
    assert type(config)().get_text_config().num_experts == 8


def test_it_can_be_around_a_text_model_alone(make_wrapper: MakeWrapper, tmp_path: Path) -> None:
    dense = make_wrapper(*GEMMA4[:2], vision_config=None, audio_config=None)
    moe = convert(dense, tmp_path / "alone", recipe(GEMMA4), target=SHIPPED).output
    inputs = {"input_ids": torch.arange(2, 40)[None]}
    assert difference(logits(load(moe), inputs), logits(load(dense), inputs)) < SAME
    assert failures(dense, moe) == []


def test_keys_and_values_that_no_layer_reads_are_left_out(
    make_wrapper: MakeWrapper, tmp_path: Path
) -> None:
    """Layers that take those of earlier ones may have their own all the same, as trained."""
    dense = clone(make_wrapper(*GEMMA4[:2]), tmp_path / "dense")
    tensors, prefix = read_tensors(dense), "model.language_model.layers"
    names = [f"self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    added = {f"{prefix}.2.{name}": tensors[f"{prefix}.0.{name}"].clone() for name in names}
    assert not added.keys() & tensors.keys()
    save_file(tensors | added, dense / "model.safetensors", metadata={"format": "pt"})
    plan = build_plan(recipe(GEMMA4), open_checkpoint(dense), target=SHIPPED)
    assert plan.dropped.keys() == added.keys()
    moe = convert(dense, tmp_path / "kept", recipe(GEMMA4), target=SHIPPED).output
    assert failures(dense, moe) == []


def renamed(source: Path, target: Path, *changes: tuple[str, str], **config: Any) -> Path:  # noqa: ANN401
    """A copy of a checkpoint with other beginnings of names."""
    tensors = {}
    for name, tensor in read_tensors(source).items():
        before, after = next(pair for pair in changes if name.startswith(pair[0]))
        tensors[after + name.removeprefix(before)] = tensor
    clone(source, target, **config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


FORMS: Mapping[str, tuple[Row, tuple[tuple[str, str], ...]]] = {
    "llava, as in memory": (
        ("llava", "llama", "mixtral"),
        (
            ("language_model.model.", IN_MEMORY_PREFIXES.text),
            ("language_model.lm_head", "lm_head"),
            ("", IN_MEMORY_PREFIXES.rest),
        ),
    ),
    "llava, as released": (
        ("llava", "llama", "mixtral"),
        (("vision_tower.", "vision_tower.vision_model."), ("", "")),
    ),
    "llava, as released, with code": (
        ("llava", "llama", SHIPPED),
        (("vision_tower.", "vision_tower.vision_model."), ("", "")),
    ),
    "gemma3, as released": (
        ("gemma3", "gemma3_text", SHIPPED),
        (("vision_tower.", "vision_tower.vision_model."), ("", "")),
    ),
    "qwen2_5_vl, as in memory": (
        ("qwen2_5_vl", "qwen2_5_vl_text", SHIPPED),
        (
            ("lm_head", "lm_head"),
            ("model.", IN_MEMORY_PREFIXES.text),
            ("", IN_MEMORY_PREFIXES.rest),
        ),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_names_of_other_forms(make_wrapper: MakeWrapper, tmp_path: Path, name: str) -> None:
    row, changes = FORMS[name]
    usual = make_wrapper(*row[:2])
    dense = renamed(usual, tmp_path / "dense", *changes)
    moe = convert(dense, tmp_path / name.replace(", ", "_"), recipe(row), target=row[2]).output
    model = load(usual)
    inputs = picture_and_text(model)
    assert difference(logits(load(moe), inputs), logits(model, inputs)) < SAME
    assert failures(dense, moe) == []
    # transformers 4 finds the vision tower by its older names alone.
    held = [sum("vision_model." in name for name in read_tensors(path)) for path in (dense, moe)]
    assert held[0] == held[1]
    # Whichever names the dense model has.
    assert failures(usual, moe, ["structure", "weights", "outputs"]) == []


def test_settings_that_are_not_in_a_config_of_their_own(
    make_wrapper: MakeWrapper, tmp_path: Path
) -> None:
    """As the first qwen2_5_vl had them, with an older word for their rotary embeddings."""
    usual = make_wrapper("qwen2_5_vl", "qwen2_5_vl_text")
    text = read_json(usual / "config.json")["text_config"]
    del text["rope_parameters"], text["model_type"]
    scaling = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text |= {"text_config": REMOVED, "rope_scaling": scaling, "rope_theta": 10000.0}
    flat = clone(usual, tmp_path / "flat", **text)
    model = load(flat)
    inputs = picture_and_text(model)
    wanted = logits(model, inputs)
    assert torch.equal(wanted, logits(load(usual), inputs))
    moe = convert(flat, tmp_path / "moe", Recipe(expansion=2, granularity=2, top_k=2)).output
    assert difference(logits(load(moe), inputs), wanted) < SAME
    assert failures(flat, moe) == []


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row[1] in ("qwen2_5_vl_text", "qwen3_vl_text")],
    ids="-".join,
)
def test_older_readers_are_told_how_heads_are_turned(make_moe: MakeMoe, row: Row) -> None:
    """transformers 5 saves it by a key that transformers 4 does not know."""
    dense, moe = (read_json(path / "config.json")["text_config"] for path in make_moe(row))
    assert dense["rope_parameters"] == _ROPE
    assert not {"rope_theta", "rope_scaling"} & dense.keys()
    scaling = {key: value for key, value in _ROPE.items() if key != "rope_theta"}
    assert moe["rope_parameters"] == _ROPE
    assert (moe["rope_theta"], moe["rope_scaling"]) == (_ROPE["rope_theta"], scaling)


def test_layers_that_predict_further_tokens_are_left_out(
    make_wrapper: MakeWrapper, tmp_path: Path
) -> None:
    dense = clone(make_wrapper("qwen3_5", "qwen3_5_text"), tmp_path / "dense")
    tensors = read_tensors(dense) | {"mtp.layers.0.mlp.gate_proj.weight": torch.ones(48, 32)}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    some = Recipe(expansion=2, granularity=2, top_k=2)
    plan = build_plan(some, open_checkpoint(dense), target=SHIPPED)
    assert [*plan.dropped] == ["mtp.layers.0.mlp.gate_proj.weight"]
    moe = convert(dense, tmp_path / "moe", some, target=SHIPPED).output
    assert failures(dense, moe) == []


def test_a_head_of_its_own_counts_whatever_the_config_says(
    make_wrapper: MakeWrapper, tmp_path: Path
) -> None:
    """mistral3's own default is a head that is the embedding, which no released one has."""
    usual = make_wrapper("mistral3", "mistral")
    dense = clone(usual, tmp_path / "dense", tie_word_embeddings=REMOVED)
    tensors = read_tensors(dense)
    head = torch.randn(260, 32, generator=torch.Generator().manual_seed(9))
    tensors["language_model.lm_head.weight"] = head
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    moe = convert(dense, tmp_path / "moe", Recipe(expansion=2, granularity=2, top_k=2)).output
    assert read_json(moe / "config.json")["text_config"]["tie_word_embeddings"] is False
    model = load(dense)
    inputs = picture_and_text(model)
    wanted = logits(model, inputs)
    assert difference(logits(load(usual), inputs), wanted) > 0.1
    assert difference(logits(load(moe), inputs), wanted) < SAME
    report = verify(dense, moe)
    assert report.passed
    ids = make_prompt(facts_of(dense, moe), TextOptions()).ids
    assert ids.numel() == report.checks[-1].metrics["tokens"]
    with torch.no_grad(), open_checkpoint(dense).reader() as reader:
        stored = dense_model(facts_of(dense, moe), reader)(input_ids=ids[:1], use_cache=False)
        assert torch.allclose(stored.logits, model(input_ids=ids[:1]).logits, atol=1e-4)


def facts_of(dense: Path, moe: Path) -> Facts:
    return gather_facts(
        open_checkpoint(dense), open_checkpoint(moe), moe_names=(), allow_inexact=False
    )


# Damage ------------------------------------------------------------------------------------------

DAMAGED: tuple[tuple[Row, str], ...] = (
    *(
        (("gemma3", "gemma3_text", SHIPPED), name)
        for name in (
            "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
            "model.multi_modal_projector.mm_input_projection_weight",
            "model.language_model.embed_tokens.weight",
            "model.language_model.layers.1.self_attn.q_proj.weight",
            "model.language_model.layers.1.mlp.gate.weight",
            "model.language_model.layers.1.mlp.expert_mlps.down_proj",
        )
    ),
    *(
        (GEMMA4, name)
        for name in (
            "model.audio_tower.layers.0.self_attn.q_proj.input_max",
            "model.embed_audio.embedding_projection.weight",
            "model.language_model.layers.3.layer_scalar",
        )
    ),
    *(
        (("llava", "llama", "qwen2_moe"), name)
        for name in (
            "vision_tower.embeddings.patch_embedding.weight",
            "language_model.lm_head.weight",
            "language_model.model.layers.0.self_attn.q_proj.bias",
            "language_model.model.layers.0.mlp.shared_expert.down_proj.weight",
            "language_model.model.layers.0.mlp.experts.3.up_proj.weight",
        )
    ),
    *(
        (("qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe_text"), name)
        for name in (
            "model.visual.deepstack_merger_list.0.linear_fc1.weight",
            "model.language_model.layers.0.mlp.experts.gate_up_proj",
        )
    ),
)


@pytest.mark.parametrize(
    ("row", "name"), DAMAGED, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_one_bit_of_any_kind_of_tensor_is_noticed(
    make_moe: MakeMoe, tmp_path: Path, row: Row, name: str
) -> None:
    dense, moe = make_moe(row)
    bad = clone(moe, tmp_path / moe.name)
    tensors = read_tensors(moe)
    tensors[name].view(torch.int32).flatten()[-1] ^= 1
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    (finding,) = failures(dense, bad, ["weights"])
    assert name in finding


def test_another_vision_tower_shows_in_what_a_picture_gives(
    make_moe: MakeMoe, tmp_path: Path
) -> None:
    dense, moe = make_moe(("qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe_text"))
    bad = clone(moe, tmp_path / "bad")
    tensors = read_tensors(moe)
    tensors["model.visual.merger.linear_fc2.weight"] *= 1.5
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    (finding,) = failures(dense, bad, ["outputs"])
    assert finding.startswith("kl_mean_picture is ")


SETTINGS: tuple[tuple[str, Callable[[dict[str, Any]], None]], ...] = (
    ("image_token_index is 249", lambda config: config.update(image_token_index=249)),
    ("vision_config is", lambda config: config["vision_config"].update(layer_norm_eps=1e-3)),
    ("sliding_window", lambda config: config["text_config"].update(sliding_window=9)),
    ("lm_head.weight is missing", lambda config: config.update(tie_word_embeddings=False)),
    ("text_config: auto_map", lambda config: config["text_config"].update(auto_map={"A": "b.C"})),
    ("needs c = 2", lambda config: config["text_config"].update(routed_scaling_factor=1)),
)


@pytest.mark.parametrize(("words", "change"), SETTINGS, ids=[words for words, _ in SETTINGS])
def test_settings_in_and_around_the_text_model(
    make_moe: MakeMoe,
    tmp_path: Path,
    words: str,
    change: Callable[[dict[str, Any]], None],
) -> None:
    dense, moe = make_moe(("gemma3", "gemma3_text", SHIPPED))
    bad = clone(moe, tmp_path / moe.name)
    config = read_json(bad / "config.json")
    change(config)
    write_json(bad / "config.json", config)
    found = failures(dense, bad, ["structure", "weights"])
    assert [failure for failure in found if words in failure], found


def test_what_prepares_pictures_is_copied_and_compared(make_moe: MakeMoe, tmp_path: Path) -> None:
    dense, moe = make_moe(("llava", "llama", "mixtral"))
    name = "preprocessor_config.json"
    assert (moe / name).read_bytes() == (dense / name).read_bytes()
    bad = clone(moe, tmp_path / "bad")
    write_json(bad / name, {"image_mean": [0.4, 0.5, 0.5]})
    assert not verify(dense, bad, checks=["files"]).passed
    (bad / name).unlink()
    assert not verify(dense, bad, checks=["files"]).passed


# There and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        ("llava", "llama", "mixtral"),
        ("gemma3", "gemma3_text", SHIPPED),
        ("qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe_text"),
    ],
    ids="-".join,
)
def test_what_transformers_saves_again_is_as_good(
    make_moe: MakeMoe, tmp_path: Path, row: Row
) -> None:
    dense, moe = make_moe(row)
    load(moe).save_pretrained(tmp_path / "again")
    assert failures(dense, tmp_path / "again", ["structure", "weights", "outputs"]) == []


@pytest.mark.parametrize(
    "row",
    [("gemma3", "gemma3_text", SHIPPED), ("qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe_text")],
    ids="-".join,
)
def test_some_layers(make_wrapper: MakeWrapper, tmp_path: Path, row: Row) -> None:
    dense = make_wrapper(*row[:2])
    some = Recipe(expansion=2, granularity=2, top_k=2, layers="1")
    moe = convert(dense, tmp_path / "some", some, target=row[2]).output
    assert inspect(moe).moe_layers == (1,)
    assert failures(dense, moe) == []


# In words ----------------------------------------------------------------------------------------

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"text_config": {"model_type": "gpt2"}}, "a llava around a text model of type 'gpt2'"),
    ({"text_config": 3}, "text_config must be an object, not 3"),
    ({"text_config": {"model_type": "mixtral"}}, "this is a mixture of experts already"),
    ({"vision_config": {"auto_map": {"A": "b.C"}}}, "vision_config: auto_map"),
)


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_refused(
    make_wrapper: MakeWrapper, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    dense = clone(make_wrapper("llava", "llama"), tmp_path / "dense", **changes)
    with pytest.raises(UpcycleError, match=words):
        convert(dense, tmp_path / "moe", Recipe(expansion=2, granularity=1, top_k=2))
    assert not (tmp_path / "moe").exists()


NO_LOSS = re.compile(r"- transformers: (nothing balances|a \w+ adds no auxiliary loss)")
"""As the card says it of what was trained, and of what was not."""


def test_the_card_loads_it_with_its_processor(make_moe: MakeMoe) -> None:
    _, moe = make_moe(("qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe_text"))
    card = (moe / "README.md").read_text()
    for words in (
        "pipeline_tag: image-text-to-text",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "processor = AutoProcessor.from_pretrained(path)",
        "set `output_router_logits` in `config.text_config`, or nothing balances the experts",
        "Qwen3VLMoeForConditionalGeneration, from qwen3_vl around qwen3_vl_text",
    ):
        assert words in card
    _, moe = make_moe(("llava", "llama", "mixtral"))
    assert NO_LOSS.search((moe / "README.md").read_text())


def test_a_loss_balances_where_the_card_says_so(make_moe: MakeMoe) -> None:
    for row in ROWS:
        if row[:2] not in {
            ("llava", "llama"),
            ("mistral3", "mistral"),
            ("qwen3_vl", "qwen3_vl_text"),
        }:
            continue
        _, moe = make_moe(row)
        says_none = NO_LOSS.search((moe / "README.md").read_text()) is not None
        model = load(moe)
        inputs = picture_and_text(model)
        model.config.get_text_config().output_router_logits = True
        try:
            found = model.train()(**inputs, labels=inputs["input_ids"])
        except TypeError:  # llava's output has no place for what the text model then returns
            assert says_none
            continue
        assert (found.get("aux_loss") is None) == says_none


def test_flops_are_those_of_the_text_model(
    make_wrapper: MakeWrapper, make_dense: MakeDense
) -> None:
    alone = make_dense("llama", head_dim=8, tie_word_embeddings=False)
    some = Recipe(expansion=4, granularity=2, top_k=4)
    plans = [
        build_plan(some, open_checkpoint(path), target="mixtral")
        for path in (alone, make_wrapper("llava", "llama"))
    ]
    assert plans[0].flops_ratio == plans[1].flops_ratio
    assert plans[0].total_parameters < plans[1].total_parameters


def test_the_command_line_knows_them(
    run_cli: RunCli, make_wrapper: MakeWrapper, make_moe: MakeMoe
) -> None:
    found = validate_json("families", run_cli("families", "--json").stdout)
    assert found["wrappers"]["qwen3_vl"] == {"qwen3_vl_text": ["qwen3_vl_moe_text", SHIPPED]}
    dense = make_wrapper("gemma3", "gemma3_text")
    seen = validate_json("inspect", run_cli("inspect", dense, "--json").stdout)
    assert (seen["model_type"], seen["targets"]) == ("gemma3 around gemma3_text", [SHIPPED])
    dry = run_cli("convert", dense, dense / "moe", "--recipe", "E2G1T2", "--dry-run", "--json")
    planned = validate_json("convert", dry.stdout)
    assert (planned["source_type"], planned["model_type"]) == ("gemma3", "upcycled_gemma3")
    _, moe = make_moe(("gemma3", "gemma3_text", SHIPPED))
    seen = validate_json(
        "inspect", run_cli("inspect", moe, "--weights", "--dense", dense, "--json").stdout
    )
    assert (seen["model_type"], seen["num_experts"]) == ("upcycled_gemma3", 4)
