"""Reports: what a page shows, that no text in it is interpreted, and where it may be written."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCli, clone, read_json, validate_json, write_json

from upcycle_cli import Recipe, convert, verify
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.inspection.summary import inspect
from upcycle_cli.report.contents import inspection_html, verification_html
from upcycle_cli.report.page import check_report_file
from upcycle_cli.verification.result import (
    TRAINED,
    CheckResult,
    LayerMeasure,
    Report,
    Status,
    TextMeasure,
)

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)> ' onload='x",
    "</style><style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x9b\u202eder\x00",
    "half \udcff a character",
    "<!-- --> &amp; ]]>",
]
ODD = [0.0, math.nan, math.inf, 1e-300, 1e300, -1e-18]


class Page(HTMLParser):
    """A page as a parser sees it; fails on bad nesting, bad links and anything that loads."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        assert {t.removeprefix("#") for t in self.targets if t[:1] == "#"} <= {*self.ids}
        assert {"script", "iframe", "object", "embed", "form", "base"}.isdisjoint(self.tags)
        assert "default-src 'none'" in html
        assert all(line.isprintable() for line in html.split("\n"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert value is not None, (tag, name)
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value)
            elif name == "aria-labelledby":
                self.targets += [f"#{target}" for target in value.split()]
            elif name in {"src", "href", "action", "data", "srcset", "poster"}:
                assert value.startswith(("#", "data:")), (tag, name, value)
                self.targets.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "@import" not in data
            assert "url(" not in data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def html_of(report: Report, moe: str = "moe") -> str:
    return verification_html(report, models=["dense", moe], command="upcycle verify dense moe")


def layer(number: int, experts: int = 8, changes: Mapping[str, Any] | None = None) -> LayerMeasure:
    names = {field.name for field in fields(LayerMeasure)} - {"layer", "idle_experts", "load"}
    values: dict[str, Any] = {**dict.fromkeys(names, 0.1 * number), **(changes or {})}
    load = [(number * 7 + expert * 3) % 11 for expert in range(experts)]
    return LayerMeasure(layer=number, idle_experts=load.count(0), load=load, **values)


def report_of(*layers: LayerMeasure, texts: tuple[TextMeasure, ...] = ()) -> Report:
    check = CheckResult(
        name="outputs",
        status=Status.PASSED,
        detail="what was found",
        metrics={"kl_mean": 1e-9, "tokens": 2048},
        layers=layers,
        texts=texts,
    )
    return Report(checks=(check,), promise="exact")


@pytest.fixture(scope="module")
def found(llama: Path, e2g2t2: Path) -> Report:
    return verify(llama, e2g2t2)


# Content ------------------------------------------------------------------------------------------


def test_a_passed_verification(found: Report, e2g2t2: Path) -> None:
    html = html_of(found, str(e2g2t2))
    page = Page(html)
    assert "✓ passed The MoE computes the function of the dense model" in page.text
    assert "Not checked" not in page.text
    assert [key for key in found.checks[2].metrics if "_" in key and f">{key}<" in html] == []
    for words in ("model mixtral (moe) made from E2G2T2, ", "Errors and routing", "Origin"):
        assert words in page.text
    for check in found.checks:
        assert " ".join(check.detail.split()) in page.text
        assert f'id="check-{check.name}"' in html
    record = read_json(e2g2t2 / "upcycle.json")
    own = hashlib.sha256((e2g2t2 / "upcycle.json").read_bytes()).hexdigest()  # push asks for it
    for digest in (own, record["plan_sha256"], record["source"]["config_sha256"]):
        assert digest in page.text
    assert "upcycle verify dense moe" in page.text
    assert page.tags.count("img") == 2  # flat values are sentences
    assert html_of(found, str(e2g2t2)) == html  # the same verification is the same page


@pytest.mark.parametrize(
    ("status", "promise", "sign", "words"),
    [
        ("failed", "exact", "✗", "The MoE does not match the dense model: 1 check failed"),
        ("measured", "none", "≈", "Nothing is wrong, but not everything is proven"),
        ("skipped", None, "–", "No check could run"),
    ],
)
def test_other_verdicts(status: str, promise: str | None, sign: str, words: str) -> None:
    check = CheckResult(name="weights", status=Status(status), detail="", failures=("a tensor",))
    page = Page(html_of(Report(checks=(check,), promise=promise)))
    assert f"{sign} {status} {words}" in page.text
    assert "Not checked: directory, " in page.text
    assert "a tensor" in page.text
    assert "Errors and routing" not in page.text


def test_a_trained_moe_is_no_mystery() -> None:
    failure = f"{TRAINED}: 3 of 4 tensors changed"
    check = CheckResult(name="weights", status=Status.FAILED, detail="", failures=(failure,))
    assert "was trained after its conversion" in Page(html_of(Report(checks=(check,)))).text


def test_tokens_that_end_inside_a_character_are_shown() -> None:
    text = TextMeasure(tokens=["", "", "港", "x"], kl=[0.5, 1e-9, 0.0, 0.0])
    html = html_of(report_of(layer(0), texts=(text,)))
    assert '<span class="k4" title="KL 0.5">·</span><span title="KL 1e-09">·</span>' in html
    assert '<span title="KL 0">港</span><span title="KL 0">x</span>' in html


def test_an_unreadable_moe(llama: Path, e2g2t2: Path, tmp_path: Path) -> None:
    damaged = clone(e2g2t2, tmp_path / "moe")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 20)
    (damaged / "upcycle.json").write_text("[")
    page = Page(html_of(verify(llama, damaged), str(damaged)))
    assert "✗ failed" in page.text
    assert "Errors and routing" not in page.text


def test_show_no_other_file_in_place_of_the_record(
    llama: Path, e2g2t2: Path, tmp_path: Path
) -> None:
    moe, secret = clone(e2g2t2, tmp_path / "moe"), tmp_path / "secret.json"
    write_json(secret, {"token": "hf_secret"})
    (moe / "upcycle.json").unlink()
    (moe / "upcycle.json").symlink_to(secret)
    assert "hf_secret" not in html_of(verify(llama, moe, checks="directory"), str(moe))


def test_an_inspection(llama: Path, e2g2t2: Path) -> None:
    inspection = inspect(e2g2t2, weights=True, dense=llama, load="builtin")
    page = Page(inspection_html(inspection, name=str(e2g2t2), command="upcycle inspect moe"))
    for words in ("2 different experts per layer", "E2G2T2", "normal rows, seed 0"):
        assert words in page.text
    assert page.tags.count("img") == 1  # the load; no expert has moved


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [math.nan, math.inf], [1e-7, *ODD, 1e-3]])
def test_odd_values_are_plotted(values: list[float]) -> None:
    odd = ("added_rms", "added_max", "hidden_rms", "gain", "router_margin", "whole_share")
    layers = [
        layer(number, changes=dict.fromkeys(odd, value)) for number, value in enumerate(values)
    ]
    kl = [value if math.isfinite(value) else None for value in values]
    texts = (TextMeasure(tokens=["a"] * len(values), kl=kl),)
    Page(html_of(report_of(*layers, texts=texts)))
    idle = [replace(layer(0), load=load) for load in ([0, 0, 0], [])]
    Page(html_of(report_of(*idle)))


def test_a_large_model_makes_no_large_page() -> None:
    layers = [layer(number, experts=128) for number in range(126)]
    texts = (TextMeasure(tokens=[" token"] * 20_000, kl=[1e-5] * 20_000),)
    html = html_of(report_of(*layers, texts=texts))
    assert "the first 16,384 are shown" in Page(html).text
    assert len(html.encode()) < 5_000_000


# Hostile text -------------------------------------------------------------------------------------


def test_text_from_files_is_shown_and_not_interpreted(e2g2t2: Path, tmp_path: Path) -> None:
    plain = Page(_page_with("plain", clone(e2g2t2, tmp_path / "plain")))
    html = _page_with(" ".join(HOSTILE), clone(e2g2t2, tmp_path / "hostile"))
    assert Page(html).tags == plain.tags
    assert "onerror=alert(1)&gt;" in html


def _page_with(text: str, moe: Path) -> str:
    """Return a page with this text wherever text can come from."""
    record = read_json(moe / "upcycle.json")
    whole = text.replace("\udcff", "")  # JSON cannot hold half a character
    record["recipe"] = dict.fromkeys(record["recipe"], whole)
    record["promise"] = whole
    record["source"] |= {"name": whole, "files": [{"name": whole, "header_sha256": whole}]}
    write_json(moe / "upcycle.json", record)
    check = CheckResult(
        name="weights",
        status=Status.FAILED,
        detail=text,
        failures=(f"{text} is missing",),
        metrics={text: text},
        layers=(layer(0), layer(1)),
        texts=(TextMeasure(tokens=[text, "b"], kl=[0.5, None]),),
    )
    report = Report(checks=(check,), promise=None, paths=(moe, moe))
    return verification_html(report, models=[text, text], command=text)


def test_the_home_directory_is_not_named(found: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    models = ["/home/somebody/d", "/home/somebody2/m"]
    html = verification_html(found, models=models, command="verify /home/somebody/d")
    assert "/home/somebody/" not in html
    assert "verify ~/d" in html
    assert "/home/somebody2/m" in html


# Files --------------------------------------------------------------------------------------------


def test_bad_places_are_refused(llama: Path, e2g2t2: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llama)
    for file, words in (
        (tmp_path / "absent" / "r.html", "cannot write"),
        (tmp_path / "r.txt", "does not end in .html"),
        (e2g2t2 / "model.safetensors", "does not end in .html"),
        (llama / "r.html", "never modified"),
        (tmp_path / "link" / "r.html", "never modified"),
        (Path("/proc/r.html"), "cannot write"),
    ):
        with pytest.raises(UpcycleError) as caught:
            check_report_file(file, llama)
        assert words in str(caught.value)
    check_report_file(e2g2t2 / "r.html", llama)
    assert not (e2g2t2 / "r.html").exists()


def test_a_missing_library_is_found_before_the_checks(
    llama: Path, e2g2t2: Path, tmp_path: Path
) -> None:
    code = (
        "import atexit, sys; sys.modules['matplotlib'] = None\n"
        "from upcycle_cli.__main__ import main\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\nmain()"
    )
    arguments = ["verify", llama, e2g2t2, "--report", tmp_path / "r.html"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Install jinja2 and matplotlib" in done.stderr
    assert done.stderr.endswith("False\n")


def test_the_commands_write_pages(
    run_cli: RunCli, llama: Path, e2g2t2: Path, tmp_path: Path
) -> None:
    file = tmp_path / "r.html"
    file.write_text("an older one")
    recipe = Recipe("E2G1T2", noise=0.1, allow_inexact=True)
    noisy = convert(llama, tmp_path / "noisy", recipe).output
    damaged = clone(e2g2t2, tmp_path / "damaged", num_local_experts=7)
    for code, words, *command in (
        (0, "--checks directory", "verify", llama, e2g2t2, "--checks", "directory", "--json-full"),
        (1, "✗ failed", "verify", llama, damaged, "--checks", "directory"),
        (0, "differ; --dense tells which", "inspect", noisy, "--weights", "--json"),
    ):
        done = run_cli(*command, "--report", file)
        assert done.returncode == code, done.stderr
        assert words in Page(file.read_text("utf-8")).text
        if str(command[-1]).startswith("--json"):
            validate_json(str(command[0]), done.stdout)
        else:
            assert f"Wrote {file}." in done.stderr.replace("\n", "")
    done = run_cli("inspect", llama, "--report", file)
    assert done.returncode == 2
    assert "--report needs an MoE" in done.stderr
