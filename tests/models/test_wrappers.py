"""Models around a text model: the MoE answers a picture and a text as the dense model does.

Models are tiny and random, the vision tower too, and run by transformers or by shipped code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import wrapped
from conftest import REMOVED, clone, difference, read_json, read_tensors
from find_families import unknown_wrappers, wrapper_row
from quantised import save_fp8
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING
from wrapped import Row

from upcycle_cli import (
    MergeRequest,
    Options,
    Recipe,
    UpcycleError,
    build_plan,
    convert,
    inspect,
    open_checkpoint,
    verify,
)
from upcycle_cli.models.overview import families
from upcycle_cli.models.wrappers import WRAPPERS
from upcycle_cli.recipe.recipe import SHIPPED

_HEAD = ("language_model.lm_head.", "lm_head.")
LLAVA: Row = ("llava", "llama", "mixtral")
GEMMA3: Row = ("gemma3", "gemma3_text", SHIPPED)
GEMMA4: Row = ("gemma4", "gemma4_text", SHIPPED)
SOME = Recipe("E2G2T2")
MakeWrapper = Callable[..., Path]
MakeMoe = Callable[[Row], tuple[Path, Path]]


@pytest.fixture(scope="module")
def make_wrapper(tmp_path_factory: pytest.TempPathFactory) -> MakeWrapper:
    @cache
    def make(wrapper: str, text: str, **around: Any) -> Path:  # noqa: ANN401
        path = tmp_path_factory.mktemp(wrapper) / "dense"
        return wrapped.save_wrapper(path, wrapper, text, around)

    return make


@pytest.fixture(scope="module")
def make_moe(make_wrapper: MakeWrapper, tmp_path_factory: pytest.TempPathFactory) -> MakeMoe:
    @cache
    def make(row: Row) -> tuple[Path, Path]:
        dense, name = make_wrapper(*row[:2]), "_".join(row)
        # transformers tells shipped code apart by the last name of its path.
        moe = tmp_path_factory.mktemp(name) / name
        return dense, convert(dense, moe, wrapped.recipe(row), target=row[2]).output

    return make


def distance(dense: Path, moe: Path) -> float:
    """How far the logits for a picture and a text are apart."""
    before = wrapped.load(dense)
    inputs = wrapped.picture_and_text(before)
    return difference(wrapped.logits(wrapped.load(moe), inputs), wrapped.logits(before, inputs))


def test_a_config_without_a_text_type_has_the_first_of_its_row() -> None:
    usual = {name: CONFIG_MAPPING[name]().text_config for name in WRAPPERS}
    assert {name: text.model_type for name, text in usual.items()} == {
        name: row.texts[0] for name, row in WRAPPERS.items()
    }
    assert families().wrappers["qwen3_vl"] == {"qwen3_vl_text": ("qwen3_vl_moe_text", SHIPPED)}


def test_find_families_proposes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrapper_row("idefics3") == 'Wrapper("idefics3", ("llama",), text="text_model"),'
    proposed = wrapper_row("internvl")
    for file, memory in (("language_model.model.", "model.language_model."), _HEAD):
        assert str((file, memory)) in proposed
    monkeypatch.delitem(WRAPPERS, "idefics3")
    assert unknown_wrappers() == {"idefics3"}


@pytest.mark.parametrize(
    ("wrapper", "stated", "text_type"),
    [
        ("exaone4_5", "exaone4_5_text", "exaone4"),
        ("granite4_vision", "granite", "granite4_vision_text"),
    ],
)
def test_another_name_of_the_text_type(
    make_wrapper: MakeWrapper, tmp_path: Path, wrapper: str, stated: str, text_type: str
) -> None:
    usual = make_wrapper(wrapper, text_type)
    text = read_json(usual / "config.json")["text_config"] | {"model_type": stated}
    moe = convert(clone(usual, tmp_path / "dense", text_config=text), tmp_path / "moe", SOME).output
    assert read_json(moe / "config.json")["text_config"]["model_type"] == text_type
    assert distance(usual, moe) < wrapped.SAME


@pytest.mark.parametrize("row", wrapped.ROWS, ids="-".join)
def test_the_moe_answers_a_picture_and_a_text_as_the_dense_model(
    make_moe: MakeMoe, row: Row, tmp_path: Path
) -> None:
    dense, moe = make_moe(row)
    before, after = wrapped.load(dense), wrapped.load(moe)
    inputs = wrapped.picture_and_text(before)
    wanted = wrapped.logits(before, inputs)
    [key] = [key for key in inputs if key.startswith("pixel_values")][:1]
    other = {**inputs, key: -inputs[key]}
    assert difference(wrapped.logits(before, other), wanted) > 1e-2  # the picture matters
    assert difference(wrapped.logits(after, inputs), wanted) < wrapped.SAME
    how = {**inputs, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(after.generate(**how), before.generate(**how))
    assert wrapped.failures(dense, moe) == []
    states = before.state_dict(), after.state_dict()
    inner = f"model.{WRAPPERS[row[0]].text}."
    around = [name for name in states[0] if not name.startswith((inner, "lm_head."))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in around)
    assert around
    again = Path(shutil.copytree(moe, tmp_path / "again"))
    after.save_pretrained(again)
    assert wrapped.failures(dense, again, ["directory", "weights"]) == []


def test_the_moe_answers_a_sound_and_a_text_as_the_dense_model(make_moe: MakeMoe) -> None:
    before, after = map(wrapped.load, make_moe(GEMMA4))
    generator = torch.Generator().manual_seed(6)
    words = torch.randint(2, wrapped.IMAGE, (1, 14), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, 2), wrapped.SOUND), words[:, 4:]], dim=1)
    heard = torch.randn(1, 8, 8, generator=generator)  # 8 frames, 4 per token
    inputs = {"input_ids": ids, "input_features": heard}
    inputs["input_features_mask"] = torch.ones(1, 8, dtype=torch.bool)
    wanted = wrapped.logits(before, inputs)
    assert difference(wrapped.logits(before, {**inputs, "input_features": -heard}), wanted) > 1e-2
    assert difference(wrapped.logits(after, inputs), wanted) < wrapped.SAME


def test_the_card_of_a_model_that_takes_pictures(make_moe: MakeMoe) -> None:
    card = (make_moe(("gemma3n", "gemma3n_text", SHIPPED))[1] / "README.md").read_text("utf-8")
    assert "\ninputs = processor.tokenizer(text=" in card  # PaliGemma's processor needs a picture
    assert "| MoE layers | 3 of 4: 1-3; sparse MLPs stay dense |" in card


def test_a_wrapper_that_keeps_its_type(make_moe: MakeMoe, tmp_path: Path) -> None:
    dense, moe = make_moe((*GEMMA4[:2], "gemma4_text"))
    types = [read_json(path / "config.json")["model_type"] for path in (dense, moe)]
    assert types == ["gemma4", "gemma4"]
    assert inspect(dense).targets == ("gemma4_text", SHIPPED)
    assert inspect(moe).moe_layers == (0, 1, 2, 3)
    with pytest.raises(UpcycleError, match="a mixture of experts already"):
        convert(moe, tmp_path / "again", wrapped.recipe(GEMMA4))


def test_a_config_that_nothing_reads(make_wrapper: MakeWrapper, tmp_path: Path) -> None:
    """Releases of SmolVLM and Idefics3 have it in the config of their text model."""
    usual, unread = (
        make_wrapper("smolvlm", "llama"),
        {"perceiver_config": {"model_type": "vllama3"}},
    )
    text = read_json(usual / "config.json")["text_config"] | unread
    dense = clone(usual, tmp_path / "dense", text_config=text)
    assert wrapped.failures(dense, convert(dense, tmp_path / "moe", SOME).output) == []


def test_llava_around_a_tower_for_pictures_of_several_sizes(tmp_path: Path) -> None:
    """Pixtral 12B is this."""
    around = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    around |= {"vision_config": wrapped.AROUND["mistral3"]["vision_config"]}
    dense = wrapped.save_wrapper(tmp_path / "dense", "llava", "mistral", around)
    recipe = wrapped.recipe(("llava", "mistral", "mixtral"))
    moe = convert(dense, tmp_path / "moe", recipe).output
    assert distance(dense, moe) < wrapped.SAME
    assert wrapped.failures(dense, moe) == []


@pytest.mark.parametrize("text", ["mistral", "ministral3"])
def test_fp8_weights_inside_a_wrapper(make_wrapper: MakeWrapper, tmp_path: Path, text: str) -> None:
    """Ministral 3 Instruct is this: a scale per tensor, and others for activations."""
    dense = save_fp8(make_wrapper("mistral3", text), tmp_path / "fp8", "tensor")
    done = convert(dense, tmp_path / "moe", SOME)
    assert wrapped.failures(dense, done.output) == []
    assert len(done.plan.dropped) == len(done.plan.source.made) == 14


def save(dense: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("others", [0, 1])
def test_counters_of_a_vision_tower_are_copied(
    make_wrapper: MakeWrapper, tmp_path: Path, others: int
) -> None:
    counter = {"vision_tower.norm.num_batches_tracked": torch.tensor(3)}
    dense = clone(make_wrapper("llava", "llama"), tmp_path / "dense")
    save(dense, read_tensors(dense) | counter)
    models = [clone(dense, tmp_path / f"other{number}") for number in range(others)]
    merge = MergeRequest(experts_from=models, rest="mean") if models else None
    options = Options(dtype="bfloat16")
    moe = convert(dense, tmp_path / "moe", "E4G2T4", options=options, merge=merge).output
    assert read_tensors(moe).items() >= counter.items()
    report = verify(dense, moe, experts_from=models, checks=["directory", "weights"])
    assert not any(check.failures for check in report.checks)
    text = {"language_model.model.layers.0.mlp.up_proj.num_batches_tracked": torch.tensor(3)}
    save(dense, read_tensors(dense) | text)
    with pytest.raises(UpcycleError, match="is stored as I64"):
        convert(dense, tmp_path / "refused", SOME)


def test_a_wrapper_without_vision_and_audio(make_wrapper: MakeWrapper, tmp_path: Path) -> None:
    dense = make_wrapper(*GEMMA4[:2], vision_config=None, audio_config=None)
    moe = convert(dense, tmp_path / "alone", wrapped.recipe(GEMMA4), target=SHIPPED).output
    inputs = {"input_ids": torch.arange(2, 40)[None]}
    found, wanted = (wrapped.logits(wrapped.load(path), inputs) for path in (moe, dense))
    assert difference(found, wanted) < wrapped.SAME
    assert wrapped.failures(dense, moe) == []


# gemma4's later layers reuse keys and values, but may have such tensors; and transformers has no
# layers for multi-token prediction, which glm_ocr has behind the others.
_LAST = "model.language_model.layers.2.self_attn"
UNREAD = {
    ("cosmos3_omni", "qwen3_vl_text", SHIPPED): {
        "layers.0.self_attn.add_q_proj.weight": 32,
        "layers.0.mlp_moe_gen.up_proj.weight": 32,
        "proj_out.weight": 32,
    },
    GEMMA4: {f"{_LAST}.{name}.weight": 32 for name in ("k_proj", "v_proj", "k_norm")},
    ("glm_ocr", "glm_ocr_text", SHIPPED): {"model.language_model.layers.2.eh_proj.weight": 32},
    ("qwen3_5", "qwen3_5_text", SHIPPED): {"mtp.layers.0.mlp.gate_proj.weight": 32},
}


@pytest.mark.parametrize("row", UNREAD, ids="-".join)
def test_tensors_that_transformers_ignores_are_dropped(
    make_wrapper: MakeWrapper, tmp_path: Path, row: Row
) -> None:
    dense = clone(make_wrapper(*row[:2]), tmp_path / "dense")
    added = {name: torch.ones(size) for name, size in UNREAD[row].items()}
    tensors = read_tensors(dense)
    assert not added.keys() & tensors.keys()
    save(dense, tensors | added)
    plan = build_plan(wrapped.recipe(row), open_checkpoint(dense), target=SHIPPED)
    assert plan.dropped.keys() == added.keys()


_TEXT, _REST = "model.language_model.", "model."
RENAMED: dict[str, tuple[Row, tuple[tuple[str, str], ...]]] = {
    "llava, as in memory": (
        LLAVA,
        (
            ("language_model.model.", _TEXT),
            ("language_model.lm_head", "lm_head"),
            ("", _REST),
        ),
    ),
    "llava, as released": (LLAVA, (("vision_tower.", "vision_tower.vision_model."), ("", ""))),
    "gemma3, as released": (GEMMA3, (("vision_tower.", "vision_tower.vision_model."), ("", ""))),
    "lfm2_vl, as released": (
        ("lfm2_vl", "lfm2", SHIPPED),
        (("model.vision_tower.", "model.vision_tower.vision_model."), ("", "")),
    ),
    "video_llava, as released": (
        ("video_llava", "llama", SHIPPED),
        (
            *((f"{name}_tower.", f"{name}_tower.vision_model.") for name in ("image", "video")),
            ("", ""),
        ),
    ),
    "qwen2_5_vl, as in memory": (
        ("qwen2_5_vl", "qwen2_5_vl_text", SHIPPED),
        (("lm_head", "lm_head"), ("model.", _TEXT), ("", _REST)),
    ),
}


@pytest.mark.parametrize("name", RENAMED)
def test_other_tensor_names(make_wrapper: MakeWrapper, tmp_path: Path, name: str) -> None:
    row, changes = RENAMED[name]
    usual, tensors = make_wrapper(*row[:2]), {}
    for old, tensor in read_tensors(usual).items():
        before, after = next(pair for pair in changes if old.startswith(pair[0]))
        tensors[after + old.removeprefix(before)] = tensor
    dense = clone(usual, tmp_path / "dense")
    save(dense, tensors)
    path = tmp_path / name.replace(", ", "_")
    moe = convert(dense, path, wrapped.recipe(row), target=row[2]).output
    assert distance(usual, moe) < wrapped.SAME
    assert wrapped.failures(dense, moe) == []
    # transformers 4 finds the vision tower only by its old names, so they stay.
    held = [sum("vision_model." in name for name in read_tensors(path)) for path in (dense, moe)]
    assert held[0] == held[1]


FLAT: dict[str, dict[str, Any]] = {
    "hunyuan_vl": {
        "rope_scaling": {
            "type": "xdrope",
            "alpha": 9.0,
            "factor": 1.0,
            "xdrope_section": [1, 1, 2],
        },
        "attention_head_dim": 8,
        "pad_id": 2,
        "pad_token_id": -1,
    },
    "paddleocr_vl": {
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
        "auto_map": {"AutoConfig": "configuration_paddleocr_vl.PaddleOCRVLConfig"},
    },
    "qwen2_vl": {},
    "qwen2_5_vl": {},
}
"""By wrapper: other settings of the first releases."""


@pytest.mark.parametrize("wrapper", FLAT)
def test_text_settings_at_the_top_level(
    make_wrapper: MakeWrapper, tmp_path: Path, wrapper: str
) -> None:
    """The first releases have these, and old names for their rotary embeddings."""
    usual = make_wrapper(wrapper, f"{wrapper}_text")
    text = read_json(usual / "config.json")["text_config"]
    del text["rope_parameters"], text["model_type"]
    scaling = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text |= {"text_config": REMOVED, "rope_scaling": scaling, "rope_theta": 10000.0}
    flat = clone(usual, tmp_path / "flat", **text | FLAT[wrapper])
    moe = convert(flat, tmp_path / "moe", SOME).output
    assert wrapper == "hunyuan_vl" or distance(usual, flat) == 0
    assert distance(flat, moe) < wrapped.SAME
    assert wrapped.failures(flat, moe) == []


def test_a_stored_head_counts_whatever_the_config_says(
    make_wrapper: MakeWrapper, tmp_path: Path
) -> None:
    """mistral3's default is a tied head, which no released model has."""
    usual = make_wrapper("mistral3", "mistral")
    dense = clone(usual, tmp_path / "dense", tie_word_embeddings=REMOVED)
    tensors = read_tensors(dense)
    head = torch.randn(260, 32, generator=torch.Generator().manual_seed(9))
    tensors["language_model.lm_head.weight"] = head
    save(dense, tensors)
    moe = convert(dense, tmp_path / "moe", SOME).output
    assert read_json(moe / "config.json")["text_config"]["tie_word_embeddings"] is False
    assert distance(usual, dense) > 0.1
    assert distance(dense, moe) < wrapped.SAME
    assert wrapped.failures(dense, moe) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": {"model_type": "gpt2"}}, "^llava around a text model of type 'gpt2'"),
        ({"text_config": 3}, "text_config must be an object, not 3"),
        ({"text_config": {"model_type": "mixtral"}}, "this is a mixture of experts already"),
        ({"vision_config": {"auto_map": {"A": "b.C"}}}, "vision_config: auto_map"),
    ],
)
def test_refuse_a_wrapper(
    make_wrapper: MakeWrapper, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    dense = clone(make_wrapper("llava", "llama"), tmp_path / "dense", **changes)
    with pytest.raises(UpcycleError, match=words):
        convert(dense, tmp_path / "moe", SOME)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("vision", [7, "x", [1], {"model_type": 7}, {"model_type": None}], ids=str)
def test_an_odd_vision_tower_is_no_crash(
    make_wrapper: MakeWrapper, tmp_path: Path, vision: object
) -> None:
    odd = clone(make_wrapper("llava", "llama"), tmp_path / "dense", vision_config=vision)
    assert inspect(odd, SOME).plan is not None
