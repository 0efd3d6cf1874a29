"""The check `engine:NAME`: both models in an engine, and every way in which that can go wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCli, validate_json, write_json
from quantised import save_fp8
from verified import edit_json, save_llama

from upcycle_cli import EngineOptions, Options, Recipe, UpcycleError, convert, verify
from upcycle_cli.models.shipped import CODE_NAME
from upcycle_cli.verification.result import CheckResult, Report, Status

TRANSFORMERS = "engine:transformers"
ANSWER = """
job = json.load(sys.stdin)
def answer(job, rows=lambda row: [-1.0] * (len(row) - 1)):
    print('"1.2"')
    texts = [[1] * job["tokens"]] * len(job["rows"])
    margins = [[3.0] * job["tokens"]] * len(job["rows"])
    logprobs = [rows(row) for row in job["rows"]]
    print(json.dumps({"texts": texts, "margins": margins, "logprobs": logprobs}))
"""

Stub = Callable[[str], Path]


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    """Make a Python that says it has the engine, and then runs these lines instead of it."""

    def make(lines: str) -> Path:
        path = tmp_path / "python"
        begin = f"#!{sys.executable}\nimport json, os, sys, time\nif sys.argv[1] == '-c':\n"
        path.write_text(f"{begin}    sys.exit(0)\n{lines}\n")
        path.chmod(0o755)
        return path

    return make


def check(dense: Path, moe: Path, python: Path | None = None, **options: Any) -> CheckResult:  # noqa: ANN401
    report = verify(
        dense,
        moe,
        checks="directory",
        engines="transformers",
        engine_options=EngineOptions(engine_python=python, **options),
    )
    assert [each.name for each in report.checks] == ["directory", TRANSFORMERS]
    return report.checks[1]


@pytest.mark.long
def test_transformers_tells_a_right_model_from_a_wrong_one(
    dense: Path, moe: Path, tmp_path: Path
) -> None:
    """The wrong one has the weights of a conversion without scaling."""
    right = check(dense, moe)
    assert right.status is Status.PASSED, right
    assert float(right.metrics["logprob_diff_max"]) < 1e-4
    assert right.metrics["same_text_tokens"] == right.metrics["text_tokens"] == 4 * 16
    convert(dense, tmp_path / "none", Recipe("E2G2T2", scaling="none"))
    shutil.copy(tmp_path / "none" / "model.safetensors", moe)
    wrong = check(dense, moe)
    assert wrong.status is Status.FAILED, wrong
    assert "log-probabilities of row 0 differ by" in wrong.failures[0]
    assert check(dense, tmp_path / "none").status is Status.MEASURED


@pytest.mark.long
def test_an_engine_gets_fp8_weights_dequantised(dense: Path, tmp_path: Path) -> None:
    source = save_fp8(dense, tmp_path / "fp8", "channel", "vllm")  # which transformers misreads
    found = check(source, convert(source, tmp_path / "moe", Recipe("E2G2T2")).output)
    assert found.status is Status.PASSED, found
    assert float(found.metrics["logprob_diff_max"]) < 1e-4


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("raise KeyError('no such architecture')", "KeyError: 'no such architecture'"),
        ("time.sleep(600)", "no answer in 2 s; `engine_timeout` sets this limit"),
        ("os.kill(os.getpid(), 9)", "the system killed it, most likely for lack of memory"),
        ("os.kill(os.getpid(), 10)", "it ended with SIGUSR1: no message"),
        ("os._exit(3)", "no message"),
        ("print('hello')", "it printed no answer, but b'hello\\n'"),
        ("print(1)\nprint(2)", "it printed no answer, but b'1\\n2\\n'"),
        ('print(1)\nprint(\'{"logprobs": [], "texts": []}\')', "it answered for other rows"),
    ],
)
def test_an_engine_that_cannot_run_a_model(
    dense: Path, mixtral: Path, stub: Stub, lines: str, why: str
) -> None:
    found = check(dense, mixtral, stub(lines), engine_timeout=2 if "sleep" in lines else 60)
    assert found.status is Status.SKIPPED
    assert f"transformers could not run the dense model: {why}" in found.detail


@pytest.mark.parametrize(("refused", "what"), [("dense", "the dense model"), ("moe", "the MoE")])
def test_an_engine_that_refuses_one_of_the_models(
    dense: Path, moe: Path, stub: Stub, refused: str, what: str
) -> None:
    path = {"dense": dense, "moe": moe}[refused]
    python = stub(f"{ANSWER}\nassert job['model'] != {str(path)!r}, 'AssertionError'\nanswer(job)")
    found = check(dense, moe, python)
    assert found.detail.startswith(f"transformers could not run {what}: AssertionError")


def test_the_command_ends_with_2_and_shows_the_other_checks(
    run_cli: RunCli, dense: Path, mixtral: Path, stub: Stub
) -> None:
    command = ("verify", dense, mixtral, "--checks", "directory", "--engine", "transformers")
    python = ("--engine-python", stub("time.sleep(600)"), "--engine-timeout", "1")
    done = run_cli(*command, *python, "--allow-inexact", "--json")
    assert done.returncode == 2
    found = validate_json("verify", done.stdout)
    assert [each["status"] for each in found["checks"]] == ["passed", "skipped"]
    assert "no answer in 1 s; --engine-timeout sets this limit" in done.stderr


def test_a_report_in_which_an_engine_did_not_run() -> None:
    checks = [CheckResult(name="weights", status=Status.PASSED, detail="")]
    checks += [CheckResult(name=TRANSFORMERS, status=Status.SKIPPED, detail="why")]
    report = Report(checks=tuple(checks), promise="exact", allow_inexact=True)
    assert (report.accepted, report.not_run) == (False, ("why",))
    failed = CheckResult(name="outputs", status=Status.FAILED, detail="")
    assert Report(checks=(*checks, failed), promise="exact").not_run == ()


def test_checkpoint_dtypes_and_softmax_topk_may_be_off_by_more(
    dense: Path, mixtral: Path, qwen2_moe: Path, stub: Stub, tmp_path: Path
) -> None:
    off = f"rows=lambda row: [-1.0 - 0.05 * (job['model'] != {str(dense)!r})] * (len(row) - 1)"
    python = stub(f"{ANSWER}\nanswer(job, {off})")
    assert check(dense, mixtral, python).status is Status.FAILED
    assert check(dense, mixtral, python, engine_dtype="auto").status is Status.PASSED
    assert check(dense, qwen2_moe, python).status is Status.PASSED
    convert(dense, tmp_path / "float16", "E2G2T2", options=Options(dtype="float16"))
    assert check(dense, tmp_path / "float16", python).status is Status.PASSED


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("vlm", {}, "'vlm' is not an engine.\nDid you mean vllm?"),
        (
            "sglang",
            {},
            "the engine sglang is not installed: {python} has no sglang.\nInstall it (pip",
        ),
        ("mlx", {}, "has no mlx-lm.\nInstall it (pip install mlx-lm), or name the Python that has"),
        (
            "transformers",
            {"engine_python": "/none/python"},
            "cannot run /none/python: No such file",
        ),
        ("transformers", {"engine_python": "/"}, "cannot run /: Permission denied.\nGive the"),
        ("transformers", {"engine_python": "/bin/false"}, "/bin/false has no transformers.\nInst"),
        (
            "transformers",
            {"engine_dtype": "int8"},
            "`engine_dtype` is 'int8'.\nUse float32 or auto.",
        ),
        ("transformers", {"engine_timeout": 0}, "`engine_timeout` must be 1 or more, not 0."),
    ],
)
def test_engines_that_cannot_be_used(
    dense: Path, mixtral: Path, engine: str, options: dict[str, Any], words: str
) -> None:
    given = {key: Path(v) if key == "engine_python" else v for key, v in options.items()}
    with pytest.raises(UpcycleError) as error:
        verify(dense, mixtral, engines=[engine], engine_options=EngineOptions(**given))  # type: ignore[arg-type]
    assert words.format(python=sys.executable) in str(error.value)


@pytest.mark.parametrize("folder", [None, Path()])
def test_llama_cpp_needs_its_converter(
    dense: Path, mixtral: Path, stub: Stub, folder: Path | None
) -> None:
    options = EngineOptions(engine_python=stub(""), llama_cpp=folder)
    with pytest.raises(UpcycleError, match=r"llama\.cpp needs its convert_hf_to_gguf"):
        verify(dense, mixtral, engines="llama.cpp", engine_options=options)


@pytest.mark.parametrize(("limit", "length"), [(None, 128), (300, 364), (4096, 128)])
def test_rows_are_longer_than_a_short_window(
    tmp_path: Path, stub: Stub, limit: int | None, length: int
) -> None:
    dense = save_llama(tmp_path / "dense", max_position_embeddings=512)
    convert(dense, tmp_path / "moe", "E2G1T1")
    edit_json(dense / "config.json", lambda config: config.update(rope={"sliding_window": limit}))
    note = f"open({str(tmp_path / 'rows')!r}, 'w').write(str([*map(len, job['rows'])]))"
    python = stub(f"{ANSWER}\n{note}\nanswer(job)")
    assert check(dense, tmp_path / "moe", python).status is Status.PASSED
    rows = json.loads((tmp_path / "rows").read_text())
    assert {*rows} == {length}


# Code that an MoE ships ---------------------------------------------------------------------------


@pytest.fixture
def olmo(tmp_path: Path, make_dense: Callable[[str], Path]) -> tuple[Path, Path]:
    dense = make_dense("olmo2")
    convert(dense, tmp_path / "moe", "E2G1T1", target="upcycled")
    return dense, tmp_path / "moe"


def remap(config: dict[str, Any]) -> None:
    config["auto_map"]["AutoModel"] = "more.Model"


@pytest.mark.parametrize(
    ("damage", "trusted"),
    [
        (lambda _: None, True),
        (lambda moe: (moe / CODE_NAME).write_text("raise SystemExit('stolen')"), False),
        (lambda moe: (moe / "more.py").write_text(""), False),
        (lambda moe: edit_json(moe / "config.json", remap), False),
        (lambda moe: write_json(moe / "tokenizer_config.json", {"auto_map": {"A": "a.B"}}), False),
    ],
)
def test_an_engine_runs_only_code_that_this_version_writes(
    olmo: tuple[Path, Path], stub: Stub, damage: Callable[[Path], object], *, trusted: bool
) -> None:
    dense, moe = olmo
    damage(moe)
    trusts = f"assert job['trust'] is (job['model'] == {str(moe)!r})"
    found = check(dense, moe, stub(f"{ANSWER}\n{trusts}\nanswer(job)"))
    assert found.status is (Status.PASSED if trusted else Status.FAILED), found
    assert trusted or found.detail.endswith("The MoE was not run.")
