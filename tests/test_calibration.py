"""Calibrations, and the routers that are made of them, or given."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense, clone, contents, read_json, read_tensors, write_json
from refusals import assert_refused, invoke
from safetensors.torch import save_file
from wrapped import FAMILIES, ROWS, save_wrapper

from upcycle_cli import Recipe, build_plan, convert, inspect, open_checkpoint, verify
from upcycle_cli.api import Request, carry_out
from upcycle_cli.calibrate import collect as passing
from upcycle_cli.calibrate.collect import TOKENS, calibrate
from upcycle_cli.calibrate.router_rows import Wanted, balanced, centroids, loads
from upcycle_cli.core.callbacks import Hooks, Watch
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.families import targets_of
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.plan.router_inputs import RouterInputs
from upcycle_cli.recipe.recipe import Promise, RouterInit, Scaling
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import Status
from upcycle_cli.write.rng import standard_normal

FEW = TextOptions(tokens=512)
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
FITTED = (RouterInit.BALANCED, RouterInit.CENTROIDS)


def recipe(name: tuple[int, int, int] = (4, 2, 4), **how: Any) -> Recipe:  # noqa: ANN401
    expansion, granularity, top_k = name
    return Recipe(expansion=expansion, granularity=granularity, top_k=top_k, **how)


def mlp_inputs(dense: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's MLP gets (P, H), by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, held: found.append(held[0].flatten(0, -2)))
    with torch.no_grad():
        model.model(ids, use_cache=False)
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of which a tiny model's tokenizer makes a token a byte."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{i} sheep and {i * i % 97} goats went by.\n" for i in range(200)))
    return path


@pytest.mark.parametrize(
    ("model_type", "target", "how"),
    [
        ("llama", "mixtral", {"router_init": "balanced"}),
        ("llama", "mixtral", {"router_init": "centroids"}),
        ("llama", "qwen2_moe", {"router_init": "balanced", "routing": "softmax-topk"}),
        ("qwen3", "glm4_moe", {"router_init": "centroids", "neuron_order": "shuffled"}),
        ("nemotron", "upcycled", {"router_init": "balanced", "routing": "sigmoid-topk"}),
        ("olmo2", "upcycled", {"router_init": "balanced"}),  # no norm before the MLP
        ("llama", "qwen2_moe", {"router_init": "balanced", "layers": "1"}),
        # Of two clusters the centres lie in one direction.
        ("llama", "mixtral", {"name": (2, 2, 2), "router_init": "centroids"}),
        ("qwen3", "glm4_moe", {"name": (2, 2, 2), "router_init": "centroids"}),
    ],
    ids=str,
)
def test_fitted_routers_keep_the_promise(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, how: dict[str, Any]
) -> None:
    dense = make_dense(model_type, dtype="bfloat16")
    done = convert(dense, tmp_path / "moe", recipe(**how), target=target)
    assert done.plan.promise is not Promise.NONE
    report = verify(dense, done.output, texts=FEW)
    assert report.passed, report.to_json()
    found = done.plan.calibration
    assert found is not None
    assert found.tokens == TOKENS
    assert tuple(found.layers) == done.plan.family.layers
    std = done.plan.recipe.router_logit_std
    for layer in found.layers.values():
        assert layer.statistics.logit_std == pytest.approx(std, rel=0.02)


def calibrate_few(dense: Path, target: str, text: Path) -> None:
    """Calibrate, and hold what was found to the shapes and to what rows are fitted to."""
    inputs = RouterInputs.read(calibration=text, rows=None)
    wanted, source = recipe(router_init="balanced"), open_checkpoint(dense)
    plan = build_plan(wanted, source, target=target, inputs=inputs)
    found = calibrate(plan, Watch())
    assert tuple(found.layers) == plan.family.layers
    for layer in found.layers.values():
        assert layer.statistics.logit_std == pytest.approx(1, rel=0.02)
        assert layer.input_mean.shape == (plan.family.dense.hidden_size,)
        assert layer.activity.shape == (plan.family.dense.intermediate_size,)


@pytest.mark.parametrize("model_type", DENSE)
def test_every_dense_type_can_be_calibrated(
    make_dense: MakeDense, tmp_path: Path, model_type: str
) -> None:
    if targets_of(DENSE[model_type]):
        (tmp_path / "few.txt").write_text("More than enough. " * 20)
        target = targets_of(DENSE[model_type])[-1]
        calibrate_few(make_dense(model_type), target, tmp_path / "few.txt")


@pytest.mark.parametrize(("wrapper", "text"), sorted({row[:2] for row in ROWS}))
def test_a_text_model_inside_of_another_can_be_calibrated(
    tmp_path: Path, wrapper: str, text: str
) -> None:
    (tmp_path / "few.txt").write_text("More than enough. " * 20)
    dense = save_wrapper(tmp_path / "dense", wrapper, text, {})
    calibrate_few(dense, targets_of(FAMILIES[wrapper][text])[-1], tmp_path / "few.txt")


@pytest.mark.parametrize("init", FITTED)
def test_what_is_found_is_what_transformers_computes(
    llama: Path, text: Path, tmp_path: Path, init: RouterInit
) -> None:
    done = convert(
        llama, tmp_path / "moe", recipe(router_init=init, router_logit_std=0.5), calibration=text
    )
    found = done.plan.calibration
    assert found is not None
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(llama)(text.read_text())["input_ids"][:TOKENS]
    tensors = read_tensors(done.output)
    for layer, inputs_PH in enumerate(mlp_inputs(llama, torch.tensor(ids).reshape(-1, 128))):
        of = found.layers[layer]
        assert torch.allclose(torch.from_numpy(of.input_mean), inputs_PH.mean(0), atol=1e-5)
        squares_H = inputs_PH.square().mean(0)
        assert torch.allclose(torch.from_numpy(of.input_square), squares_H, rtol=1e-4)
        logits_PE = inputs_PH @ tensors[ROUTER.format(layer)][::2].T
        assert float(logits_PE.std(0).mean()) == pytest.approx(0.5, rel=1e-3)
        # What all tokens share says nothing: no group is ahead of the others.
        assert float(logits_PE.mean(0).abs().max()) < 1e-4
        load_E = loads(logits_PE.double().numpy(), 2)
        assert of.statistics.load_cv == pytest.approx(load_E.std() / load_E.mean(), abs=1e-3)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_no_layer_keeps_the_pages_that_were_read_of_the_model(llama: Path, tmp_path: Path) -> None:
    # A file of its own, since others of this process may have mapped llama's.
    dense = clone(llama, tmp_path / "dense")

    class Pages(Watch):
        held: tuple[str, ...] = ()

        def checked(self, done: int, total: int, unit: str) -> None:
            _, *maps = Path("/proc/self/smaps").read_text().split(str(dense / "model.safetensors"))
            self.held += (
                f"{done} of {total} {unit}",
                *(of.split("Rss:")[1].split()[0] for of in maps),
            )

    watch, plan = Pages(), build_plan(recipe(router_init="balanced"), open_checkpoint(dense))
    calibrate(plan, watch)
    assert watch.held == ("1 of 2 layers", "0", "2 of 2 layers", "0"), "kilobytes"


def test_a_calibration_alone_changes_no_byte(llama: Path, text: Path, tmp_path: Path) -> None:
    plain = convert(llama, tmp_path / "plain", recipe())
    done = convert(llama, tmp_path / "moe", recipe(), calibration=text)
    for name in ("model.safetensors", "config.json"):
        assert (done.output / name).read_bytes() == (plain.output / name).read_bytes()
    record = read_json(done.output / "upcycle.json")["calibration"]
    assert record["text"] == "words.txt"
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    assert read_json(plain.output / "upcycle.json")["calibration"] is None
    assert verify(llama, done.output, texts=FEW).passed


def test_two_runs_are_the_same_and_a_finished_one_is_recognised(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(router_init="balanced")
    one = convert(llama, tmp_path / "one", wanted)
    assert contents(convert(llama, tmp_path / "two", wanted).output) == contents(one.output)
    other = convert(llama, tmp_path / "three", wanted, calibration=Path(__file__))
    assert other.plan.digest != one.plan.digest

    def never(*_: object) -> Calibration:
        raise AssertionError("there is nothing to be found out")

    monkeypatch.setattr(passing, "calibrate", never)
    assert convert(llama, one.output, wanted).already_done


class _Killed(BaseException):
    pass


class _Kill(Hooks[Any, Any]):
    def advance(self, num_bytes: int) -> None:
        raise _Killed(num_bytes)


def test_a_killed_run_goes_on_with_what_was_found(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(router_init="balanced")
    undisturbed = convert(llama, tmp_path / "undisturbed", wanted)
    request = Request(source=llama, output=tmp_path / "moe", recipe=wanted)
    with pytest.raises(_Killed):
        carry_out(request, hooks=_Kill())
    partial = tmp_path / "moe.partial"
    assert (partial / ".upcycle-calibration").is_file()
    runs = []

    def counted(*arguments: Any) -> Calibration:  # noqa: ANN401
        runs.append(1)
        return calibrate(*arguments)

    monkeypatch.setattr(passing, "calibrate", counted)
    done = carry_out(request)
    assert not runs
    assert contents(done.output) == contents(undisturbed.output)
    # What is damaged, or another recipe's, is found out again.
    with pytest.raises(_Killed):
        carry_out(dataclasses.replace(request, output=tmp_path / "again"), hooks=_Kill())
    (tmp_path / "again.partial" / ".upcycle-calibration").write_bytes(b"not what was written")
    runs.clear()
    again = carry_out(dataclasses.replace(request, output=tmp_path / "again"))
    assert runs == [1]
    assert contents(again.output) == contents(undisturbed.output)


def test_what_was_found_can_be_read_back(llama: Path) -> None:
    plan = build_plan(recipe(router_init="balanced"), open_checkpoint(llama))
    found = calibrate(plan, Watch())
    data = found.to_bytes()
    assert Calibration.from_bytes(data).digest == found.digest
    with pytest.raises(ValueError, match="deserializing"):
        Calibration.from_bytes(data[:-1])


@pytest.mark.parametrize("chosen", [1, 4])
def test_balanced_rows_are_chosen_evenly_where_drawn_ones_are_not(chosen: int) -> None:
    generator = np.random.RandomState(0)
    P, H, E = 3000, 64, 32

    def inputs() -> np.ndarray[Any, Any]:
        # As a norm's output: most of it in a few dimensions that hardly vary.
        held = generator.standard_normal((P, H))
        held[:, :3] = [20, -9, 5] + held[:, :3] * [3, 2, 1]
        return held

    seen, unseen = inputs(), inputs()

    def draw(stream: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
        return standard_normal(0, stream, shape)

    wanted = Wanted(rows=E, chosen=chosen, logit_std=1.0, stream="layers.0.router")
    drawn_E = loads(unseen @ draw(wanted.stream, (E, H)).T, chosen)
    for fit, share in ((balanced, 0.25), (centroids, 0.5)):
        rows_EH = fit(seen, wanted, draw)
        load_E = loads(unseen @ rows_EH.T, chosen)
        assert load_E.std() < share * drawn_E.std()
        assert load_E.min() > 0
        assert np.allclose((seen @ rows_EH.T).std(0), 1.0)
        assert np.abs(rows_EH @ seen.mean(0)).max() < 1e-9


def test_an_unlucky_draw_is_drawn_again() -> None:
    inputs_PH = np.random.RandomState(0).standard_normal((500, 16))
    asked = []

    def draw(stream: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
        asked.append(stream)
        drawn = standard_normal(0, stream, shape)
        if stream == "router":
            drawn[2:] = drawn[1]  # the first of ties takes all
        return drawn

    wanted = Wanted(rows=4, chosen=1, logit_std=1.0, stream="router")
    load_E = loads(inputs_PH @ balanced(inputs_PH, wanted, draw).T, 1)
    assert "router.1" in asked
    assert load_E.min() > 0.25 * load_E.mean()


@pytest.mark.parametrize(("std", "promise"), [(1.0, Promise.NONE), (0.001, Promise.APPROXIMATE)])
def test_a_measured_c_makes_the_mean_gain_one(
    llama: Path, tmp_path: Path, std: float, promise: Promise
) -> None:
    how: dict[str, Any] = {"routing": "softmax-topk", "router_logit_std": std}
    gains = {}
    for scaling in ("exact", "measured"):
        wanted = recipe((8, 2, 4), scaling=scaling, router_init="balanced", **how)
        done = convert(llama, tmp_path / scaling, wanted, target="qwen2_moe")
        assert done.plan.promise is promise
        report = verify(llama, done.output, allow_inexact=promise is Promise.NONE)
        assert report.accepted, report.to_json()
        assert report.promise == promise
        outputs = report.checks[-1]
        assert outputs.status is not Status.FAILED
        gains[scaling] = sum(layer.gain for layer in outputs.layers) / len(outputs.layers)
    assert abs(gains["measured"] - 1) < 0.05
    found = done.plan.calibration
    assert found is not None
    assert done.plan.factors.c == pytest.approx(2 / found.gates)
    if promise is Promise.NONE:
        assert gains["exact"] > 1.2
    again = convert(llama, done.output, wanted, target="qwen2_moe")
    assert again.already_done
    assert again.plan.factors == done.plan.factors


def test_where_gates_sum_to_one_there_is_nothing_to_measure(llama: Path) -> None:
    plan = build_plan(recipe(scaling="measured"), open_checkpoint(llama))
    assert plan.recipe.scaling is Scaling.EXACT
    assert plan.inputs.text is None


def rows(
    llama: Path,
    path: Path,
    shape: tuple[int, int],
    generator: torch.Generator | None = None,
    **more: torch.Tensor,
) -> Path:
    generator = generator or torch.Generator().manual_seed(3)
    layers = range(open_checkpoint(llama).config["num_hidden_layers"])
    made = {f"layers.{layer}.router": torch.randn(shape, generator=generator) for layer in layers}
    save_file(made | more, path)
    return path


@pytest.mark.parametrize(("dtype", "grouped"), [("float32", True), ("bfloat16", False)])
def test_rows_of_a_file_are_taken_as_they_are(
    make_dense: MakeDense,
    tmp_path: Path,
    dtype: str,
    grouped: bool,  # noqa: FBT001 - a case
) -> None:
    dense = make_dense("llama", dtype=dtype)
    file = rows(dense, tmp_path / "rows.safetensors", (4, 32) if grouped else (8, 32))
    output = tmp_path / "moe"
    options: list[str | Path] = ["--recipe", "E4G2T4", "--router-init", file, "--json"]
    options += ["--calibration", "builtin"]
    options += [] if grouped else ["--no-virtual-groups"]
    result = invoke("convert", dense, output, *options)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["router_init"] == "file"
    assert told["router_logit_std"] is None
    assert len(told["calibration"]["layers"]) == 2
    given, made = read_tensors(file.parent), read_tensors(output)
    for layer in range(2):
        wanted = given[f"layers.{layer}.router"].to(getattr(torch, dtype))
        wanted = wanted.repeat_interleave(2, 0) if grouped else wanted
        assert torch.equal(made[ROUTER.format(layer)], wanted)
    assert verify(dense, output, texts=FEW, allow_inexact=not grouped).accepted
    held = verify(dense, output, router_init=file, texts=FEW, allow_inexact=not grouped)
    assert held.accepted, held.to_json()
    # Another file is another output.
    other = rows(dense, tmp_path / "other.safetensors", (4, 32), torch.Generator().manual_seed(4))
    refused = invoke("convert", dense, output, "--recipe", "E4G2T4", "--router-init", other)
    assert_refused(refused, str(output))
    claims, weights = verify(
        dense, output, checks=["directory", "weights"], router_init=other
    ).checks
    assert "rows were given in 'rows.safetensors', and those of" in claims.failures[0]
    assert f"row 0 is not that of layers.0.router in {other}" in weights.failures[0]


@pytest.mark.parametrize("told", [True, False])
def test_rows_are_held_to_their_file(
    llama: Path,
    tmp_path: Path,
    told: bool,  # noqa: FBT001 - a case
) -> None:
    """Rows of which one has the other sign do as well as these; that they are these can be seen."""
    file, moe = rows(llama, tmp_path / "rows.safetensors", (4, 32)), tmp_path / "moe"
    assert invoke("convert", llama, moe, "-r", "E4G2T4", "--router-init", file).exit_code == 0
    record, tensors = read_json(moe / "upcycle.json"), read_tensors(moe)
    assert record["router_file"].keys() == {"name", "sha256"}
    note = "have rows of 'rows.safetensors', and were not held to it"
    if not told:  # as an earlier version has written it
        del record["router_file"]
        write_json(moe / "upcycle.json", record)
        note = "a file that it does not name"
    (claims,) = verify(llama, moe, checks=["directory"]).checks
    assert claims.status is Status.PASSED
    assert note in claims.detail
    name = ROUTER.format(1)
    before = tensors[name].numpy().tobytes()
    tensors[name][2:4] *= -1
    after, weights_file = tensors[name].numpy().tobytes(), moe / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes().replace(before, after))
    (claims,) = verify(llama, moe, checks=["directory"]).checks
    assert any("SHA-256 differs" in failure for failure in claims.failures)
    # Whoever writes to the record as well is found by the file.
    record["routers"][name] = hashlib.sha256(after).hexdigest()
    write_json(moe / "upcycle.json", record)
    assert verify(llama, moe, checks=["directory", "weights"]).accepted
    (weights,) = verify(llama, moe, checks=["weights"], router_init=file).checks
    wanted = f"{name}: row 2 is the opposite of that of layers.1.router in {file}"
    assert weights.failures == (wanted,)


def test_a_file_of_other_layers_or_sizes_is_not_that_of_a_router(
    balanced_moe: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, moe = balanced_moe
    file = tmp_path / "rows.safetensors"
    save_file({"layers.0.router": torch.eye(3, 32)}, file)
    (weights,) = verify(dense, moe, checks=["weights"], router_init=file).checks
    assert "of shape [3, 32], which is not for this router" in weights.failures[0]
    assert f"{file} has no layers.1.router" in weights.failures[1]
    (claims,) = verify(dense, moe, checks=["directory"]).checks
    assert "rows that were fitted to 'builtin', which was not run again" in claims.detail
    refused = invoke("verify", dense, moe, "--router-init", tmp_path / "none")
    assert_refused(refused, "there is no file", "--router-init takes a safetensors file")
    assert_refused(invoke("verify", moe, moe.parent, "--router-init", file), "config.json")


NO_MORE: Mapping[str, torch.Tensor] = {}
Spoil = Callable[[Path, Path], list[str | Path]]


def _text(content: bytes, name: str = "text.txt") -> Spoil:
    def make(folder: Path, _dense: Path) -> list[str | Path]:
        (folder / name).write_bytes(content)
        return ["--calibration", folder / name]

    return make


def _file(shape: tuple[int, int] = (4, 32), more: Mapping[str, torch.Tensor] = NO_MORE) -> Spoil:
    def make(folder: Path, dense: Path) -> list[str | Path]:
        file = rows(dense, folder / "rows.safetensors", shape, None, **more)
        return ["--router-init", file]

    return make


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (_text(b""), ["text.txt", "no text"]),
        (_text(b" \n\n"), ["text.txt", "no text"]),
        (_text(b"\x00\xff\xfe\x81"), ["text.txt", "not UTF-8"]),
        (_text(b"Too short."), ["text.txt", "too short", "256"]),
        (_text(b'{"text": 1}\n', "text.jsonl"), ["text.jsonl", "line 1"]),
        (lambda *_: ["--calibration", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (lambda *_: ["--router-init", "balance"], ["balance", "normal, balanced, centroids"]),
        (_file((3, 32)), ["[3, 32]", "[4, 32]"]),
        (_file((8, 32)), ["[8, 32]", "[4, 32]"]),
        (_file(more={"layers.2.router": torch.eye(32)[:4]}), ["layers.2.router", "no layer"]),
        (_file(more={"layers.1.router": torch.ones(4, 32)}), ["layers.1.router", "equal rows"]),
        (_file(more={"layers.1.router": torch.eye(32)[:4] * torch.nan}), ["not finite"]),
        (
            _file(more={"layers.1.router": torch.eye(32)[:4] * torch.arange(4.0)[:, None]}),
            ["zeros"],
        ),
        (_file(more={"layers.1.router": torch.ones(4, dtype=torch.int32)}), ["I32"]),
        (
            lambda folder, dense: [*_file()(folder, dense), "--layers", "0", "--top-k", "4"],
            ["layers.1.router", "--layers"],
        ),
        (
            lambda folder, dense: [*_file()(folder, dense), "--router-logit-std", "1"],
            ["taken as they are", "--router-logit-std"],
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    llama: Path, tmp_path: Path, options: Spoil, words: list[str]
) -> None:
    given = [option for option in options(tmp_path, llama) if option not in ("--top-k", "4")]
    result = invoke("convert", llama, tmp_path / "moe", "--recipe", "E4G2T4", *given)
    assert_refused(result, *words)
    assert not list(tmp_path.glob("moe*"))


def test_a_calibration_needs_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    for file in dense.glob("*token*"):
        file.unlink()
    result = invoke("convert", dense, tmp_path / "moe", "-r", "E4G2T4", "--router-init", "balanced")
    assert_refused(result, "needs text as tokens", "tokenizer", "--router-init normal")
    assert not list(tmp_path.glob("moe*"))


def test_a_plan_says_what_routers_are_made_from(llama: Path) -> None:
    inputs = RouterInputs.read(calibration="builtin", rows=None)
    plan = inspect(llama, recipe(router_init="centroids"), inputs=inputs).plan
    assert plan is not None
    result = invoke("inspect", llama, "-r", "E4G2T4", "--router-init", "centroids", "--tensors")
    assert "centroids rows" in result.stdout
    assert "calibrated on builtin" in result.stdout
    assert f"given(layers.1.router, of {inputs.text.digest[:12]})" in result.stdout  # type: ignore[union-attr]


def test_the_card_and_a_recipe_file_say_what_was_used(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "recipe.toml"
    options: list[str | Path] = ["--router-init", "balanced", "--calibration", text]
    options += ["--save-config", saved]
    assert invoke("convert", llama, tmp_path / "one", "-r", "E4G2T4", *options).exit_code == 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert "balanced rows" in card
    assert "words.txt" in card
    result = invoke("convert", llama, tmp_path / "two", "--config", saved)
    assert result.exit_code == 0, result.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


Damage = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def _record(**changes: Any) -> Damage:  # noqa: ANN401
    def damage(record: dict[str, Any], _tensors: dict[str, torch.Tensor]) -> None:
        record["calibration"] |= changes

    return damage


def _claim(init: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Other rows, which are said to be what they are not."""

    def damage(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        record["recipe"]["router_init"] = init
        if init == "file":
            record["recipe"]["router_logit_std"] = None
        for name in record["routers"]:
            rows_EH = make(tensors[name][::2].clone())
            tensors[name] = rows_EH.repeat_interleave(2, 0).contiguous()
            data = tensors[name].numpy().tobytes()
            record["routers"][name] = hashlib.sha256(data).hexdigest()

    return damage


def _in_one_dimension(rows_EH: torch.Tensor) -> torch.Tensor:
    rows_EH[:, 5] += 1000 * torch.arange(1, len(rows_EH) + 1)
    return rows_EH


def _outweighed(rows_EH: torch.Tensor) -> torch.Tensor:
    rows_EH[1] *= 1000
    return rows_EH


def _close_rows(rows_EH: torch.Tensor) -> torch.Tensor:
    return rows_EH[0] + 0.01 * rows_EH


@pytest.mark.parametrize(
    ("damage", "check", "words"),
    [
        (lambda record, _: record.update(calibration=None), "claims", "calibration"),
        (_record(text_sha256="x"), "claims", "text_sha256"),
        (lambda record, _: record.update(router_file={}), "claims", "router_file.sha256"),
        (
            lambda record, _: record.update(router_file={"sha256": "0" * 64}),
            "claims",
            "rows of no file",
        ),
        (_record(tokens=0), "claims", "tokens"),
        (_record(layers=[]), "claims", "layers"),
        (
            lambda record, _: record["calibration"]["layers"][1].update(logit_std=2.0),
            "claims",
            "were fitted to logits",
        ),
        (lambda record, _: record["recipe"].update(router_init="best"), "claims", "router_init"),
        (
            lambda record, _: record["recipe"].update(router_logit_std=None),
            "claims",
            "router_logit_std",
        ),
        (_claim("file", _in_one_dimension), "weights", "one of their dimensions"),
        (_claim("file", _outweighed), "weights", "a hundred times"),
        (_claim("centroids", _close_rows), "weights", "differ by"),
        (_claim("centroids", lambda rows_EH: 100 * rows_EH), "outputs", "fitted to"),
        (_claim("balanced", _in_one_dimension), "weights", "in one direction"),
        (_claim("file", lambda rows_EH: rows_EH * 1e38), "weights", "its logits can reach"),
    ],
)
def test_verify_finds_routers_that_are_not_what_is_claimed(
    balanced_moe: tuple[Path, Path], tmp_path: Path, damage: Damage, check: str, words: str
) -> None:
    dense, made = balanced_moe
    moe = clone(made, tmp_path / "moe")
    record, tensors = read_json(moe / "upcycle.json"), read_tensors(moe)
    damage(record, tensors)
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    write_json(moe / "upcycle.json", record)
    report = verify(dense, moe, checks=[check], texts=FEW)
    assert not report.passed
    assert any(words in failure for failure in report.checks[0].failures), report.to_json()


@pytest.fixture(scope="module")
def balanced_moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    output = tmp_path_factory.mktemp("balanced") / "moe"
    convert(llama, output, recipe(router_init="balanced"))
    assert verify(llama, output, texts=FEW).passed
    return llama, output
