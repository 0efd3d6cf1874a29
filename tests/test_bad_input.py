"""Everything a user can get wrong: one clear message, exit code 2, and nothing written.

Of configs, weights and outputs there is more than of the rest: test_bad_config.py,
test_bad_weights.py and write/test_preflight.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYOUTS, MakeDense, clone, contents, read_json
from refusals import Refuses, assert_refused, invoke, save_tensors

from upcycle_cli import Options, Recipe, UpcycleError, convert
from upcycle_cli.recipe.recipe import ExpertLayout, Routing, ScaleSplit, Scaling

# Where the source is ------------------------------------------------------------------------------


def test_no_such_path(refuses: Refuses, tmp_path: Path) -> None:
    message = refuses(tmp_path / "absent", "does not exist", str(tmp_path / "absent"))
    assert "hf download" not in message  # an absolute path is no repo


def test_a_repo_id(refuses: Refuses) -> None:
    refuses(
        Path("some-org/some-model"),
        "some-org/some-model is neither a directory nor complete in the cache",
        "hf download some-org/some-model",
    )


def test_not_a_directory(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    refuses(tmp_path / "file", "is not a directory")


def test_a_dangling_link(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refuses(tmp_path / "link", "does not exist")


def test_a_path_that_loops(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuses(tmp_path / "loop", str(tmp_path / "loop"))


def test_a_path_that_is_too_long(refuses: Refuses, tmp_path: Path) -> None:
    refuses(tmp_path / ("x" * 300), "x" * 300)


def test_an_empty_directory(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "has no config.json")


# The recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["no recipe", "--recipe E8G1T2"]),
        (("--recipe", ""), ["is not a recipe"]),
        (("--recipe", "8x2"), ["'8x2' is not a recipe", "E8G1T2"]),
        (("--recipe", "E8G1"), ["is not a recipe"]),
        (("--recipe", "E8T2G1"), ["is not a recipe"]),
        (("--recipe", "E-8G1T2"), ["is not a recipe"]),
        (("--recipe", "E8.5G1T2"), ["is not a recipe"]),
        (("--recipe", "E8G1T2 extra"), ["is not a recipe"]),
        (("--recipe", "[bold]"), ["'[bold]' is not a recipe"]),
        (("--recipe", "E" + "9" * 5000 + "G1T2"), ["recipe"]),
        (("--recipe", "E0G1T1"), ["expansion (E) must be at least 1, not 0"]),
        (("--recipe", "E8G0T1"), ["granularity (G) must be at least 1"]),
        (("--recipe", "E8G1T0"), ["top-k (T) must be at least 1"]),
        (("--recipe", "E2G2T6"), ["top-k 6 is more than the 4 experts", "at most 4"]),
        (("--recipe", "E2G2T3"), ["not a multiple of granularity 2", "2 or 4", "--allow-inexact"]),
        (("--recipe", "E2G2T1"), ["Use a top-k of 2", "--allow-inexact"]),
        (("--recipe", "E2G5T5"), ["48 is not divisible by granularity 5", "4 or 6"]),
        (("--recipe", "E2G96T96"), ["48 is not divisible by granularity 96", "Try 48."]),
        (("--recipe", "E2G2T2", "--expansion", "2"), ["Use one or the other"]),
        (("--recipe", "E2G2T2", "-T", "2"), ["Use one or the other"]),
        (("--expansion", "2", "--top-k", "2"), ["--granularity missing"]),
        (("-E", "2"), ["--granularity and --top-k missing"]),
        (("-E", "-2", "-G", "1", "-T", "1"), ["expansion (E) must be at least 1, not -2"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_recipes(
    llama: Path, refuses: Refuses, arguments: tuple[str, ...], words: list[str]
) -> None:
    refuses(llama, *words, arguments=arguments)


def test_a_recipe_of_absurd_size(llama: Path, refuses: Refuses) -> None:
    """Refused before anybody makes a list of so many tensors."""
    for name in ("E4097G1T1", "E999999999G1T1", "E999999999G999999999T999999999"):
        refuses(llama, "experts per layer", "4096", arguments=("--recipe", name))


def test_an_inexact_top_k_on_demand(llama: Path, tmp_path: Path) -> None:
    arguments = ("convert", llama, tmp_path / "moe", "--recipe", "E2G2T3", "--allow-inexact")
    done = invoke(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "top-k 3 is not a multiple of G = 2" in " ".join(done.stderr.split())
    assert read_json(tmp_path / "moe" / "config.json")["num_experts_per_tok"] == 3


# Other options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--scaling", "abc", "not exact, paper, none, measured or a number"),
        ("--scaling", "", "not exact, paper, none, measured or a number"),
        ("--scaling", "-1", "positive number"),
        ("--scaling", "0", "positive number"),
        ("--scaling", "nan", "positive number"),
        ("--scaling", "inf", "positive number"),
        ("--scaling", "1e-400", "positive number"),
        ("--scaling", "1e308", "infinite"),
        ("--router-logit-std", "0", "positive number"),
        ("--router-logit-std", "-0.1", "positive number"),
        ("--router-logit-std", "nan", "positive number"),
        ("--router-logit-std", "inf", "positive number"),
        # Infinite weights, or zeros that would tie every group.
        ("--router-logit-std", "1e300", "overflow float32"),
        ("--router-logit-std", "1e-300", "cannot hold"),
        ("--seed", "-1", "seed"),
        ("--seed", str(2**63), "seed"),
        ("--max-shard-size", "x", "'x' is not a size"),
        ("--max-shard-size", "", "is not a size"),
        ("--max-shard-size", "-5GB", "is not a size"),
        ("--max-shard-size", "5 apples", "is not a size"),
        ("--max-shard-size", "0", "positive"),
        ("--max-shard-size", "0.1B", "positive"),
    ],
)
def test_option_values(llama: Path, refuses: Refuses, option: str, value: str, words: str) -> None:
    refuses(llama, words, arguments=("--recipe", "E2G2T2", f"{option}={value}"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "gpt"),
        ("--routing", "random"),
        ("--dtype", "int8"),
        ("--scale-split", "up"),
        ("--expert-layout", "packed"),
        ("--seed", "one"),
        ("--seed", "1.5"),
        ("--top-k", "two"),
        ("--router-logit-std", "small"),
        ("--no-such-option",),
        ("surplus",),
    ],
)
def test_usage_errors(llama: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = invoke("convert", llama, tmp_path / "moe", "--recipe", "E2G2T2", *arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert arguments[0] in result.stderr
    assert list(tmp_path.iterdir()) == []


# Other commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe"
    convert(llama, path, Recipe(expansion=2, granularity=2, top_k=2))
    return path


def test_inspect(llama: Path, moe: Path, tmp_path: Path) -> None:
    assert_refused(invoke("inspect", tmp_path / "absent"), "does not exist")
    assert_refused(invoke("inspect", "org/name"), "hf download org/name")
    assert_refused(invoke("inspect", moe, "--recipe", "E2G2T2"), "mixture of experts already")
    assert_refused(invoke("inspect", llama, "--recipe", "E2"), "is not a recipe")
    assert_refused(invoke("inspect", llama, "--recipe", "E2G5T5"), "not divisible")
    assert_refused(invoke("inspect", llama, "--weights"), "dense model", "--weights")
    assert_refused(invoke("inspect", moe, "--dense", llama), "--weights")
    assert_refused(invoke("inspect", moe, "--weights", "--dense", moe), "mixture of experts")
    assert_refused(
        invoke("inspect", moe, "--weights", "--dense", tmp_path / "no"), "does not exist"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": "4"},
        {"num_local_experts": 0},
        {"num_local_experts": None},
        {"num_local_experts": 3},
        {"num_local_experts": 8},
        {"num_experts_per_tok": [2]},
        {"num_experts_per_tok": -1},
        {"num_experts_per_tok": 9},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": 5},
        {"num_hidden_layers": None},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspecting_an_moe_whose_config_is_wrong(
    llama: Path, tmp_path: Path, changes: dict[str, Any], layout: ExpertLayout
) -> None:
    recipe, options = Recipe(expansion=2, granularity=2, top_k=2), Options(expert_layout=layout)
    convert(llama, tmp_path / "good", recipe, options=options)
    broken = clone(tmp_path / "good", tmp_path / "moe", **changes)
    assert_refused(invoke("inspect", broken, "--weights"))


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b"{}", b'{"recipe": 3, "source": []}'])
def test_inspecting_an_moe_whose_record_is_wrong(moe: Path, tmp_path: Path, record: bytes) -> None:
    broken = clone(moe, tmp_path / "moe")
    (broken / "upcycle.json").write_bytes(record)
    for form in ((), ("--json",)):
        result = invoke("inspect", broken, *form)
        assert result.exception is None or isinstance(result.exception, SystemExit)


def test_inspecting_against_another_dense_model(
    moe: Path, make_dense: MakeDense, tmp_path: Path
) -> None:
    smaller = make_dense("llama", hidden_size=16, intermediate_size=16)
    assert_refused(invoke("inspect", moe, "--weights", "--dense", smaller), "is not the source")
    one_layer = clone(make_dense("llama"), tmp_path / "dense")
    save_tensors(one_layer, lambda tensors: tensors.pop("model.layers.0.mlp.gate_proj.weight"))
    assert_refused(invoke("inspect", moe, "--weights", "--dense", one_layer), "lacks")


def test_verify(llama: Path, moe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for arguments, words in (
        ((tmp_path / "no", moe), str(tmp_path / "no")),
        ((llama, tmp_path / "no"), str(tmp_path / "no")),
        ((llama, llama), "llama"),
        ((moe, moe), "The dense model comes first"),
        ((moe, llama), "llama"),
        ((llama, moe, "--checks", "all"), "'all' is not a check"),
        ((llama, moe, "--checks", ""), "check"),
        ((llama, moe, "--prompts", tmp_path / "no.txt"), "no.txt"),
        ((llama, moe, "--prompts", tmp_path / "empty.txt"), "empty.txt"),
        ((llama, moe, "--prompts", tmp_path), str(tmp_path)),
    ):
        assert_refused(invoke("verify", *arguments), words)


def test_demo_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    assert_refused(invoke("demo", tmp_path), "exists and is not empty")
    assert_refused(invoke("demo", tmp_path / "thesis.tex"), "thesis.tex")
    assert contents(tmp_path) == before


# The same from Python -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [
        {"expansion": 0, "granularity": 1, "top_k": 1},
        {"expansion": 2, "granularity": 1, "top_k": 3},
        {"expansion": 2, "granularity": 1, "top_k": 1, "scaling": float("nan")},
        {"expansion": 2, "granularity": 1, "top_k": 1, "seed": -1},
        {"expansion": 2, "granularity": 1, "top_k": 1, "scaling": 0},
        {"expansion": 2, "granularity": 1, "top_k": 1, "scaling": "double"},
        {"expansion": 2, "granularity": 1, "top_k": 1, "routing": "random"},
        {"expansion": 2, "granularity": 1, "top_k": 1, "scale_split": "up"},
    ],
)
def test_a_recipe_is_valid_or_is_not_made(wanted: dict[str, Any]) -> None:
    with pytest.raises(UpcycleError):
        Recipe(**wanted)


@pytest.mark.parametrize(
    "wanted", [{"dtype": "int8"}, {"expert_layout": "packed"}, {"max_shard_bytes": 0}]
)
def test_options_are_valid_or_are_not_made(wanted: dict[str, Any]) -> None:
    with pytest.raises(UpcycleError):
        Options(**wanted)


def test_names_mean_the_same_as_members() -> None:
    """Or else a plain string would quietly stand for another routing or layout."""
    loose: dict[str, Any] = {"routing": "topk-softmax", "scaling": "paper", "scale_split": "down"}
    recipe = Recipe(expansion=2, granularity=2, top_k=2, **loose)
    assert recipe.routing is Routing.TOPK_SOFTMAX
    assert recipe.scaling is Scaling.PAPER
    assert recipe.scale_split is ScaleSplit.DOWN
    fused: dict[str, Any] = {"expert_layout": "fused"}
    assert Options(**fused).expert_layout is ExpertLayout.FUSED
    whole: dict[str, Any] = {"scaling": 4}
    assert Recipe(expansion=2, granularity=1, top_k=2, **whole).factors().c == 4.0


def test_an_unknown_target_from_python(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="is not a target"):
        convert(llama, tmp_path / "moe", Recipe(expansion=2, granularity=1, top_k=1), target="gpt")


def test_a_quantised_moe_is_not_looked_into(moe: Path, tmp_path: Path) -> None:
    broken = clone(moe, tmp_path / "moe")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    save_tensors(broken, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert invoke("inspect", broken).exit_code == 0
    assert_refused(invoke("inspect", broken, "--weights"), name, "I8")
