"""The output as a whole: repeatable, complete, and put where it belongs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    LAYOUTS,
    MakeDense,
    RunCli,
    clone,
    contents,
    logits,
    random_ids,
    read_json,
    read_tensors,
    snapshot,
    validate_json,
    write_json,
)
from engine_fixtures import Advance, execute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upcycle_cli import Options, Recipe, UpcycleError, build_plan, convert, open_checkpoint
from upcycle_cli.models.engines import Support
from upcycle_cli.publish.card import card_for_repo
from upcycle_cli.recipe.recipe import ExpertLayout, Routing
from upcycle_cli.write.staging import MARKER

RECIPE = Recipe(expansion=2, granularity=2, top_k=2)
TWICE = Recipe(expansion=4, granularity=2, top_k=4)


def others(directory: Path) -> list[str]:
    """What lies beside the usual `dense` and `moe`."""
    return sorted({entry.name for entry in directory.iterdir()} - {"dense", "moe"})


def spoil(weights: Path) -> None:
    """Change the last byte, as a disk would: neither the size nor the time tells."""
    status = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


# The same bytes every time ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_two_runs_give_the_same_files(
    make_dense: MakeDense, tmp_path: Path, model_type: str, layout: ExpertLayout
) -> None:
    options = Options(expert_layout=layout, max_shard_bytes=50_000)
    for name in ("one", "two"):
        path = tmp_path / name / "moe"  # the same name: the card may say it
        convert(make_dense(model_type), path, TWICE, options=options, checksums=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_two_processes_give_the_same_files(llama: Path, tmp_path: Path, run_cli: RunCli) -> None:
    convert(llama, tmp_path / "one" / "moe", RECIPE)
    # Another hash seed and another number of threads, seen from another directory.
    (tmp_path / "two").mkdir()
    dense = os.path.relpath(llama, tmp_path / "two")
    arguments = ("convert", dense, "moe", "--recipe", RECIPE.name)
    done = run_cli(*arguments, cwd=tmp_path / "two", PYTHONHASHSEED="7", OMP_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_threads_do_not_change_a_bit(llama: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            convert(llama, tmp_path / str(count), TWICE, options=Options(dtype="bfloat16"))
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shard_bytes=st.integers(1, 300_000))
def test_shard_size_does_not_change_a_tensor(llama: Path, tmp_path: Path, shard_bytes: int) -> None:
    reference, path = tmp_path / "reference", tmp_path / "sharded"
    if not reference.exists():
        convert(llama, reference, RECIPE)
    shutil.rmtree(path, ignore_errors=True)
    done = convert(llama, path, RECIPE, options=Options(max_shard_bytes=shard_bytes))
    expected, found = read_tensors(reference), read_tensors(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for shard in done.plan.shards:
        # A tensor that is larger than a shard may be gets a shard of its own.
        assert shard.nbytes <= shard_bytes or len(shard.tensors) == 1
    open_checkpoint(path)  # the index and the files agree


def test_another_seed_changes_the_routers_only(llama: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        recipe = Recipe(expansion=2, granularity=2, top_k=2, seed=seed)
        convert(llama, tmp_path / str(seed), recipe)
    one, two = read_tensors(tmp_path / "0"), read_tensors(tmp_path / "1")
    assert {name for name in one if not torch.equal(one[name], two[name])} == {
        f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)
    }


def test_routers_have_the_logits_that_were_asked_for(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense("llama", hidden_size=64)
    recipe = Recipe(expansion=64, granularity=2, top_k=2, router_logit_std=0.5)
    convert(dense, tmp_path / "moe", recipe)
    tensors = read_tensors(tmp_path / "moe")
    for layer in range(2):
        router_NH = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        gamma_H = tensors[f"model.layers.{layer}.post_attention_layernorm.weight"]
        groups = router_NH.reshape(64, 2, 64)
        assert torch.equal(groups[:, 0], groups[:, 1])
        assert len({tuple(row.tolist()) for row in groups[:, 0]}) == 64
        nominal = float(router_NH.double().std() * gamma_H.double().norm())
        assert nominal == pytest.approx(0.5, rel=0.05)  # 4096 draws: a standard error of 1 %


def test_layers_and_matrices_have_routers_of_their_own(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    tensors = read_tensors(tmp_path / "moe")
    one, two = (tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2))
    # The two layers' norms differ, which scales the rows; their directions must differ too.
    cosine = torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0)
    assert abs(float(cosine)) < 0.5


# What the output holds ----------------------------------------------------------------------------


def test_companions_are_copied(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    found, source = contents(tmp_path / "moe"), contents(llama)
    companions = source.keys() - {"README.md", "config.json", "model.safetensors"}
    assert companions >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    }
    assert {name: found[name] for name in companions} == {name: source[name] for name in companions}
    own = {"README.md", "config.json", "model.safetensors", "upcycle.json"}
    assert found.keys() == companions | own


def test_weights_in_other_formats_and_hidden_files_stay_behind(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    for name in ("pytorch_model.bin", ".gitattributes", "training_args.bin", "model.onnx"):
        (dense / name).write_bytes(b"something")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 }}")
    convert(dense, tmp_path / "moe", RECIPE)
    found = contents(tmp_path / "moe")
    assert not found.keys() & {"pytorch_model.bin", ".gitattributes", "training_args.bin"}
    assert "additional_chat_templates/tool_use.jinja" in found


def test_the_tokenizer_and_generation_config_load(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    convert(llama, tmp_path / "moe", RECIPE)
    text = "Ein Häuschen, 3 × 7."
    one, two = (AutoTokenizer.from_pretrained(path) for path in (llama, tmp_path / "moe"))
    assert one(text).input_ids == two(text).input_ids
    assert two.chat_template == one.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "moe").temperature == 0.6


def test_the_model_card_is_one_that_the_hub_accepts(llama: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    convert(llama, tmp_path / "moe", RECIPE)
    card = ModelCard.load(tmp_path / "moe" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"  # carried over from the source's card
    assert data["language"] == ["en", "fr"]
    assert data["library_name"] == "transformers"
    assert {"moe", "mixtral"} <= set(data["tags"])
    assert "E2G2T2" in card.text
    assert "Keep master weights in float32" in card.text
    assert str(tmp_path) not in card.content


def test_the_model_card_says_how_to_serve_it_with_what_runs_it(llama: Path, tmp_path: Path) -> None:
    vllm = "python -m vllm.entrypoints.openai.api_server --model my-org/dense-E2G2T2"
    llama_cpp = "convert_hf_to_gguf.py model"
    expected = {
        ("mixtral", Routing.TOPK_SOFTMAX): (True, True),
        ("qwen2_moe", Routing.TOPK_SOFTMAX): (True, False),  # llama.cpp does not renormalise
    }
    for number, ((target, routing), runs) in enumerate(expected.items()):
        recipe = replace(RECIPE, routing=routing)
        done = convert(llama, tmp_path / str(number), recipe, target=target)
        card = (tmp_path / str(number) / "README.md").read_text()
        assert (f"```sh\n{vllm}\n```" in card, llama_cpp in card) == runs
        listed = {engine.name for engine in done.plan.engines if engine.support is Support.RUNS}
        assert ("vLLM" in listed, "llama.cpp" in listed) == runs
    served = card_for_repo((tmp_path / "0" / "README.md").read_text(), "me/moe")
    assert "api_server --model me/moe\n" in served
    assert "\nhf download me/moe --local-dir model\n" in served


@pytest.mark.parametrize(
    "source_card",
    [None, b"no front matter", b"---\nlicense: [\n---\n", b"---\n- a list\n---\n", b"\xff\xfe\x00"],
)
def test_a_source_card_that_says_nothing_is_no_obstacle(
    llama: Path, tmp_path: Path, source_card: bytes | None
) -> None:
    from huggingface_hub import ModelCard

    dense = clone(llama, tmp_path / "dense")
    (dense / "README.md").unlink()
    if source_card is not None:
        (dense / "README.md").write_bytes(source_card)
    convert(dense, tmp_path / "moe", RECIPE)
    assert "license" not in ModelCard.load(tmp_path / "moe" / "README.md").data.to_dict()


def test_the_record_says_how_it_was_made_and_not_where(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", TWICE)
    text = (tmp_path / "moe" / "upcycle.json").read_text()
    assert str(tmp_path) not in text
    assert str(llama.parent) not in text
    record = json.loads(text)
    assert record["recipe"]["name"] == "E4G2T4"
    assert record["recipe"]["seed"] == 0
    assert record["source"]["name"] == "dense"
    factors = {"c": 2.0, "gate": 1.0, "up": 2.0, "down": 1.0, "config": 1.0}
    assert record["factors"] == factors
    assert record["moe_layers"] == [0, 1]
    assert len(record["routers"]) == 2


def test_no_file_names_the_directories_it_was_made_in(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense", _name_or_path=str(tmp_path / "secret"))
    convert(dense, tmp_path / "moe", RECIPE, checksums=True, verify=True)
    for file in (tmp_path / "moe").iterdir():
        assert os.fsencode(tmp_path) not in file.read_bytes(), file.name


def test_checksums_are_what_sha256sum_reads(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense("llama")
    convert(dense, tmp_path / "moe", RECIPE, checksums=True)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "moe", check=False).returncode == 0
    listed = {
        line.split("  ", 1)[1] for line in (tmp_path / "moe/SHA256SUMS").read_text().splitlines()
    }
    assert listed == contents(tmp_path / "moe").keys() - {"SHA256SUMS", "README.md"}

    with (tmp_path / "moe" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    damaged = subprocess.run(check, cwd=tmp_path / "moe", check=False, capture_output=True)
    assert damaged.returncode == 1


def test_checksums_can_be_added_to_a_finished_output(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    assert not (tmp_path / "moe/SHA256SUMS").exists()
    assert convert(llama, tmp_path / "moe", RECIPE, checksums=True).already_done
    convert(llama, tmp_path / "reference", RECIPE, checksums=True)
    assert contents(tmp_path / "moe") == contents(tmp_path / "reference")


# The source and the output directory --------------------------------------------------------------


def test_the_source_is_never_touched(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    before, modified = snapshot(dense), dense.stat().st_mtime_ns
    convert(dense, tmp_path / "moe", RECIPE, verify=True)
    assert snapshot(dense) == before
    assert dense.stat().st_mtime_ns == modified


def test_a_second_run_finds_nothing_to_do(llama: Path, tmp_path: Path) -> None:
    first = convert(llama, tmp_path / "moe", RECIPE)
    before = snapshot(tmp_path / "moe")
    second = convert(llama, tmp_path / "moe", RECIPE)
    assert (first.already_done, second.already_done) == (False, True)
    assert second.published
    assert snapshot(tmp_path / "moe") == before
    assert others(tmp_path) == []


def test_a_second_run_verifies_when_asked_to(llama: Path, tmp_path: Path) -> None:
    """Sizes and config are all that makes an output count as finished; bytes can rot."""
    convert(llama, tmp_path / "moe", RECIPE)
    good = convert(llama, tmp_path / "moe", RECIPE, verify=True)
    assert good.already_done
    assert good.report is not None
    assert good.published
    spoil(tmp_path / "moe" / "model.safetensors")
    bad = convert(llama, tmp_path / "moe", RECIPE, verify=True)
    assert bad.report is not None
    assert not bad.report.passed
    assert not bad.published


def test_a_damaged_output_is_not_taken_for_finished(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    weights = tmp_path / "moe" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-100])
    with pytest.raises(UpcycleError, match="not empty"):
        convert(llama, tmp_path / "moe", RECIPE)
    # It may be anybody's model by now.
    with pytest.raises(UpcycleError, match=r"holds model\.safetensors, which is not as upcycle"):
        convert(llama, tmp_path / "moe", RECIPE, overwrite=True)
    weights.unlink()
    assert not convert(llama, tmp_path / "moe", RECIPE, overwrite=True).already_done
    assert weights.read_bytes() == good


def test_a_changed_source_is_converted_again(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    convert(dense, tmp_path / "moe", RECIPE)
    weights = dense / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # the same size and header: another model
    weights.write_bytes(data)
    with pytest.raises(UpcycleError, match="not empty"):
        convert(dense, tmp_path / "moe", RECIPE)
    assert not convert(dense, tmp_path / "moe", RECIPE, overwrite=True).already_done


def test_overwrite_replaces_the_whole_directory(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    with pytest.raises(UpcycleError, match="--overwrite"):
        convert(llama, tmp_path / "moe", TWICE)
    assert read_json(tmp_path / "moe" / "config.json")["num_local_experts"] == 4
    convert(llama, tmp_path / "moe", TWICE, overwrite=True)
    assert read_json(tmp_path / "moe" / "config.json")["num_local_experts"] == 8
    assert others(tmp_path) == []


def test_overwrite_keeps_what_upcycle_did_not_write(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    (tmp_path / "moe" / "checkpoint-1000").mkdir()
    (tmp_path / "moe" / "checkpoint-1000" / "optimizer.pt").write_text("weeks of training")
    before = snapshot(tmp_path)
    with pytest.raises(UpcycleError, match=r"holds checkpoint-1000/optimizer\.pt"):
        convert(llama, tmp_path / "moe", TWICE, overwrite=True)
    assert snapshot(tmp_path) == before


def test_overwrite_keeps_a_source_that_is_linked_from_elsewhere(
    llama: Path, tmp_path: Path
) -> None:
    """A snapshot in the Hub's cache is links to its blobs."""
    repo = tmp_path / "models--org--tiny"
    convert(llama, repo / "blobs", RECIPE)
    (repo / "snapshots" / "0").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(llama / name, repo / "blobs" / name)
        (repo / "snapshots" / "0" / name).symlink_to(repo / "blobs" / name)
    before = snapshot(tmp_path)
    with pytest.raises(UpcycleError, match="contains the source"):
        convert(repo / "snapshots" / "0", repo / "blobs", RECIPE, overwrite=True)
    assert snapshot(tmp_path) == before


def test_the_current_directory_is_not_replaced(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(llama, tmp_path / "here", RECIPE)
    monkeypatch.chdir(tmp_path / "here")
    before = snapshot(tmp_path)
    with pytest.raises(UpcycleError, match="current directory"):
        convert(llama, ".", TWICE, overwrite=True)
    assert snapshot(tmp_path) == before


def test_overwrite_repairs_a_finished_output(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    before = contents(tmp_path / "moe")
    spoil(tmp_path / "moe" / "model.safetensors")
    assert not convert(llama, tmp_path / "moe", RECIPE, overwrite=True).already_done
    assert contents(tmp_path / "moe") == before


def test_an_empty_directory_or_a_missing_parent_will_do(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(llama, tmp_path / "empty", RECIPE)
    convert(llama, tmp_path / "a" / "b" / "moe", RECIPE)
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b" / "moe")
    assert not (tmp_path / "empty" / MARKER).exists()


def test_an_empty_output_needs_no_overwrite_but_takes_it(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    convert(llama, tmp_path / "moe", RECIPE, overwrite=True)
    assert others(tmp_path) == []


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer\n.json", "tokenizer\\x.json", "LICENSE \x1b[31m"])
def test_a_name_that_no_list_could_hold_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    """SHA256SUMS would have to quote it, and upcycle.json lists no such name."""
    dense = clone(llama, tmp_path / "dense")
    (dense / name).write_text("{}")
    with pytest.raises(UpcycleError, match="has a file named"):
        convert(dense, tmp_path / "moe", RECIPE, checksums=True)
    (dense / name).rename(dense / "LICENSE (é) 1.txt")
    convert(dense, tmp_path / "moe", RECIPE, checksums=True)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "moe", check=False).returncode == 0


# A dry run ---------------------------------------------------------------------------------------


def occupied(output: Path, _: Path) -> None:
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")


def a_file(output: Path, _: Path) -> None:
    output.write_text("years of work")


def made_before(output: Path, dense: Path) -> None:
    convert(dense, output, RECIPE)


def made_otherwise(output: Path, dense: Path) -> None:
    convert(dense, output, TWICE)


def begun(output: Path, dense: Path) -> None:
    def stop(_: int) -> None:
        raise OSError(5, "stopped by the test")

    with pytest.raises(UpcycleError, match="stopped by the test"):
        execute(build_plan(RECIPE, open_checkpoint(dense)), output, hooks=Advance(stop))


REFUSED = "without --dry-run this is refused: "
FORESEEN: list[tuple[Callable[[Path, Path], None], tuple[str, ...], str | None]] = [
    (lambda *_: None, (), None),
    (lambda output, _: output.mkdir(), (), None),
    (occupied, (), f"{REFUSED}.* exists and is not empty"),
    (occupied, ("--overwrite",), f"{REFUSED}.* was not made by upcycle"),
    (made_before, (), "is already what this command makes"),
    (made_before, ("--overwrite",), None),
    (made_otherwise, (), f"{REFUSED}.* exists and is not empty"),
    (made_otherwise, ("--overwrite",), None),
    (a_file, (), f"{REFUSED}.* not a directory"),
    (lambda output, dense: output.symlink_to(dense), (), f"{REFUSED}OUTPUT is the source itself"),
    (begun, (), "moe.partial exists"),
]


@pytest.mark.parametrize("output", ["/", "..", "other/..", ".", "moe/../..", "../empty/gone/.."])
@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--save-config", "u.toml")])
def test_an_output_without_a_name_is_refused(
    llama: Path, tmp_path: Path, run_cli: RunCli, output: str, options: tuple[str, ...]
) -> None:
    (tmp_path / "here" / "other").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    command = ("convert", llama, output, "--recipe", RECIPE.name, *options)
    done = run_cli(*command, cwd=tmp_path / "here")
    assert done.returncode == (0 if "--dry-run" in options else 2)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.partial*")) == []


@pytest.mark.parametrize(("prepare", "options", "note"), FORESEEN)
def test_a_dry_run_shows_the_plan_and_what_a_real_one_would_find(
    llama: Path,
    tmp_path: Path,
    run_cli: RunCli,
    prepare: Callable[[Path, Path], None],
    options: tuple[str, ...],
    note: str | None,
) -> None:
    prepare(tmp_path / "moe", llama)
    before = snapshot(tmp_path)
    command = ("convert", llama, tmp_path / "moe", "--recipe", RECIPE.name, "--dry-run", *options)
    shown = run_cli(*command)
    assert shown.returncode == 0, shown.stderr
    assert "E2G2T2" in shown.stdout
    said = " ".join(shown.stderr.split())
    found = validate_json("convert", run_cli(*command, "--json").stdout)
    assert found["status"] == "planned"
    notes = [text for text in found["warnings"] if str(tmp_path) in text or REFUSED in text]
    if note is None:
        assert notes == []
        assert REFUSED not in said
    else:
        assert re.search(note, notes[0])
        assert REFUSED not in note or REFUSED in said
    assert snapshot(tmp_path) == before


# Bytes --------------------------------------------------------------------------------------------


def test_unaligned_sources_are_read(llama: Path, tmp_path: Path) -> None:
    """The format does not promise that tensors start at a multiple of their items' size."""
    dense = clone(llama, tmp_path / "dense")
    raw = (dense / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    header += b" " * (1 + -len(header) % 4)  # one more than a multiple of 4
    assert len(header) % 4 == 1
    unaligned = len(header).to_bytes(8, "little") + header + raw[8 + length :]
    (dense / "model.safetensors").write_bytes(unaligned)
    convert(llama, tmp_path / "aligned", RECIPE)
    convert(dense, tmp_path / "moe", RECIPE)
    weights = "model.safetensors"
    assert (tmp_path / "moe" / weights).read_bytes() == (
        tmp_path / "aligned" / weights
    ).read_bytes()


def test_the_written_files_are_ones_that_safetensors_takes(llama: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    convert(llama, tmp_path / "moe", RECIPE)
    path = tmp_path / "moe" / "model.safetensors"
    with safe_open(path, "pt") as file:  # checks offsets, overlaps and holes
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without
    # Whoever maps the file can use the tensors as they lie.
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 1e-45, -0.0])
def test_odd_values_of_the_dense_model_are_kept(
    llama: Path, tmp_path: Path, special: float
) -> None:
    from safetensors.torch import load_file, save_file

    dense = clone(llama, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = special
    tensors["model.norm.weight"][0] = special
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    convert(dense, tmp_path / "moe", RECIPE)
    written = read_tensors(tmp_path / "moe")
    up = written["model.layers.1.block_sparse_moe.experts.0.w3.weight"]
    for value, expected in (
        (up[0, 0], torch.tensor(special) * 2),
        (written["model.norm.weight"][0], torch.tensor(special)),
    ):
        assert torch.equal(value.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("routing", list(Routing))
def test_powers_of_two_lose_nothing(
    make_dense: MakeDense, tmp_path: Path, routing: Routing
) -> None:
    """The dense MLP can be put together again from any group, bit for bit, even in bf16."""
    dense = make_dense("qwen2", dtype="bfloat16")
    recipe = Recipe(expansion=2, granularity=4, top_k=4, routing=routing)
    done = convert(dense, tmp_path / "moe", recipe)
    assert done.plan.lossless
    source, moe = read_tensors(dense), read_tensors(tmp_path / "moe")
    for group in range(2):
        for matrix, dim, factor in (
            ("gate_proj", 0, done.plan.factors.gate),
            ("up_proj", 0, done.plan.factors.up),
            ("down_proj", 1, done.plan.factors.down),
        ):
            shards = [
                moe[f"model.layers.0.mlp.experts.{group * 4 + shard}.{matrix}.weight"] / factor
                for shard in range(4)
            ]
            assert torch.equal(
                torch.cat(shards, dim=dim), source[f"model.layers.0.mlp.{matrix}.weight"]
            )


def test_python_callers_may_pass_strings(llama: Path, tmp_path: Path) -> None:
    convert(str(llama), str(tmp_path / "moe"), RECIPE)
    assert torch.isfinite(logits(tmp_path / "moe", random_ids())).all()


def test_a_checkpoint_in_the_current_directory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = clone(llama, tmp_path / "dense")
    monkeypatch.chdir(dense)
    convert(".", "../moe", RECIPE)
    assert read_json(tmp_path / "moe" / "upcycle.json")["source"]["name"] == "dense"


def test_a_config_that_was_changed_makes_another_model(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    write_json(tmp_path / "moe" / "config.json", {})
    # The record still matches, and so do the weights; the config is part of the result as well.
    with pytest.raises(UpcycleError, match="not empty"):
        convert(llama, tmp_path / "moe", RECIPE)
