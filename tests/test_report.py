"""Reports: what a page says, that nothing in it is obeyed, and where it may be written."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCli, clone, read_json, validate_json, write_json

from upcycle_cli import Recipe, convert, verify
from upcycle_cli.checkpoint.card_metadata import is_edited
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.inspection.summary import inspect
from upcycle_cli.publish.card import card_for_repo
from upcycle_cli.publish.manifest import read_manifest
from upcycle_cli.report import inspection_html, verification_html
from upcycle_cli.report.report_file import ReportFile
from upcycle_cli.verification.result import (
    CHECK_NAMES,
    CheckResult,
    LayerMeasure,
    Report,
    Status,
    TextMeasure,
)

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)> ' onload='x",
    "</style><style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x9b\u202eder\x00",
    "half \udcff a character",
    "<!-- --> &amp; ]]>",
]
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """A page as a parser sees it; fails where elements are not nested, or lead out of it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        assert {t.removeprefix("#") for t in self.targets if t[:1] == "#"} <= {*self.ids}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"h1", "h2", "h3", "h4"}:
            level = int(tag[1])
            assert level <= (self.headings[-1] if self.headings else 0) + 1
            self.headings.append(level)
        for name, value in attrs:
            assert value is not None or name == "open", (tag, name)
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value or "")
            elif name in {"aria-labelledby", "aria-describedby"}:
                self.targets += [f"#{target}" for target in (value or "").split()]
            elif name in {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}:
                assert value is not None
                assert value.startswith(("#", "data:")), (tag, name, value)
                self.targets.append(value)
            elif value is not None and "url(" in value:
                assert value.count("url(") == value.count("url(#"), (tag, name, value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
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


def parsed(html: str) -> Page:
    """Take a page apart, and check what holds of every one."""
    page = Page(html)
    assert {"script", "iframe", "object", "embed", "form", "base"}.isdisjoint(page.tags)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert page.tags.count("main") == page.tags.count("title") == page.tags.count("nav") == 1
    assert page.tags.count("caption") == page.tags.count("table")
    assert page.tags.count("figcaption") == page.tags.count("figure")
    assert "default-src 'none'" in html
    assert '<html lang="en">' in html
    # All characters can be seen.
    assert all(line.isprintable() for line in html.split("\n"))
    return page


def html_of(report: Report, moe: str = "moe") -> str:
    return verification_html(report, dense="dense", moe=moe, command="upcycle verify dense moe")


def layer(number: int, /, *, experts: int = 8, **changes: Any) -> LayerMeasure:  # noqa: ANN401
    values: dict[str, Any] = {
        "added_rms": 1e-7 * (number + 1),
        "added_max": 1e-5,
        "gain": 1.0,
        "hidden_rms": 3e-7,
        "whole_share": 0.75,
        "router_entropy": 1.5,
        "router_margin": 0.2,
        "load_cv": 0.5,
    } | changes
    load = [(number * 7 + expert * 3) % 11 for expert in range(experts)]
    return LayerMeasure(layer=number, idle_experts=load.count(0), load=load, **values)


def report_of(
    *layers: LayerMeasure, status: Status = Status.PASSED, texts: tuple[TextMeasure, ...] = ()
) -> Report:
    check = CheckResult(
        name="outputs",
        status=status,
        detail="what was found",
        metrics={"kl_mean": 1e-9, "tokens": 2048},
        layers=layers,
        texts=texts,
    )
    return Report(checks=(check,), promise="exact")


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "moe"
    convert(llama, path, Recipe(expansion=2, granularity=2, top_k=2))
    return path


@pytest.fixture(scope="module")
def found(llama: Path, moe: Path) -> Report:
    return verify(llama, moe)


# What a page says ---------------------------------------------------------------------------------


def test_a_verification_that_passed(found: Report, moe: Path) -> None:
    page = parsed(html_of(found, str(moe)))
    assert "✓ passed The MoE computes the function of the dense model" in page.text
    assert "Not checked" not in page.text
    for heading in ("Recipe and factors", "Error by layer", "Routing", "Expert load", "Origin"):
        assert heading in page.text
    for check in found.checks:
        assert " ".join(check.detail.split()) in page.text
    record = read_json(moe / "upcycle.json")
    for digest in (record["plan_sha256"], record["source"]["config_sha256"]):
        assert digest in page.text
    assert "upcycle verify dense moe" in page.text
    assert "How each model goes on" in page.text
    assert page.tags.count("svg") == 6
    # The same verification is the same page.
    assert html_of(found, str(moe)) == html_of(found, str(moe))


def test_a_verification_that_failed(llama: Path, moe: Path, tmp_path: Path) -> None:
    damaged = clone(moe, tmp_path / "moe")
    record = read_json(damaged / "upcycle.json")
    record["routers"] = dict.fromkeys(record["routers"], "0" * 64)
    write_json(damaged / "upcycle.json", record)
    report = verify(llama, damaged, checks=["directory"])
    page = parsed(html_of(report))
    assert "✗ failed The MoE is not what the method makes" in page.text
    assert "1 check failed (claims)" in page.text
    assert "Not checked: files, weights, outputs." in page.text
    failures = report.checks[1].failures
    assert failures
    for failure in failures:
        assert " ".join(failure.split()) in page.text


def test_a_verification_that_only_measured(llama: Path, tmp_path: Path) -> None:
    inexact = Recipe(expansion=2, granularity=2, top_k=1, allow_inexact=True)
    convert(llama, tmp_path / "moe", inexact)
    report = verify(llama, tmp_path / "moe", allow_inexact=True)
    assert report.status == "measured"
    page = parsed(html_of(report))
    assert "≈ measured Nothing is wrong and nothing is proven" in page.text
    assert "KL at most" in page.text
    assert '<span class="k' in html_of(report)


def test_an_moe_that_cannot_be_read(llama: Path, moe: Path, tmp_path: Path) -> None:
    damaged = clone(moe, tmp_path / "moe")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 20)
    (damaged / "upcycle.json").write_text("[")
    page = parsed(html_of(verify(llama, damaged), str(damaged)))
    assert "✗ failed" in page.text
    assert "– skipped" in page.text
    assert "Error by layer" not in page.text


def test_an_inspection(moe: Path) -> None:
    inspection = inspect(moe, weights=True)
    page = parsed(inspection_html(inspection, name=str(moe), command="upcycle inspect moe"))
    for words in ("2 different experts of 4", "E2G2T2", "Tensors by name", "normal rows, seed 0"):
        assert words in page.text
    assert page.tags.count("svg") == 1


# What is measured can be anything -----------------------------------------------------------------

ODD = [0.0, math.nan, math.inf, 1e-300, 1e300, -1e-18]


def odd_page(values: list[float]) -> str:
    fields = ("added_rms", "added_max", "hidden_rms", "gain", "router_margin", "whole_share")
    changed: list[dict[str, Any]] = [dict.fromkeys(fields, value) for value in values]
    layers = [layer(number, **changes) for number, changes in enumerate(changed)]
    kl = [value if math.isfinite(value) else None for value in values]
    texts = (TextMeasure(tokens=["a"] * len(values), kl=kl),)
    return html_of(report_of(*layers, texts=texts))


@pytest.mark.parametrize("value", ODD)
def test_odd_values_are_drawn(value: float) -> None:
    html = odd_page([value, value])
    parsed(html)
    assert ("Hollow marks lie at exactly 0." in html) == (value == 0)


def test_odd_values_are_drawn_beside_others() -> None:
    html = odd_page([1e-7, *ODD, 1e-3])
    parsed(html)
    assert "Hollow marks lie at exactly 0." in html


def test_no_expert_and_no_token() -> None:
    parsed(html_of(report_of(replace(layer(0), load=[0, 0, 0]))))
    parsed(html_of(report_of(replace(layer(0), load=[]), texts=(TextMeasure(tokens=[], kl=[]),))))
    parsed(html_of(Report(checks=())))


def test_a_large_model_makes_no_large_page() -> None:
    layers = [layer(number, experts=128) for number in range(126)]
    texts = (TextMeasure(tokens=[" token"] * 20_000, kl=[1e-5] * 20_000),)
    html = html_of(report_of(*layers, texts=texts))
    assert "the first 16,384 are shown" in parsed(html).text
    assert len(html.encode()) < 5_000_000


# Nothing is obeyed --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return parsed(_spoilt("plain", clone(moe, tmp_path_factory.mktemp("plain") / "moe")))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_files_is_shown_and_not_obeyed(
    text: str, plain: Page, moe: Path, tmp_path: Path
) -> None:
    hostile = _spoilt(text, clone(moe, tmp_path / "moe"))
    # Element for element what it is for a plain text.
    assert parsed(hostile).tags == plain.tags
    assert "onerror" not in text or "onerror=alert(1)&gt;" in hostile


def _spoilt(text: str, moe: Path) -> str:
    """Return a page that has a text wherever one can come from."""
    record = read_json(moe / "upcycle.json")
    whole = text.replace("\udcff", "")  # of half a character, no record is read
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
    return verification_html(report, dense=text, moe=text, command=text)


def test_somebodys_home_is_not_named(found: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    html = verification_html(
        found, dense="/home/somebody/d", moe="/home/somebody2/m", command="verify /home/somebody/d"
    )
    assert "/home/somebody/" not in html
    assert "verify ~/d" in html
    assert "/home/somebody2/m" in html


# Where it may be written --------------------------------------------------------------------------


def run_checked(run_cli: RunCli, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = run_cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_places_that_are_refused(llama: Path, moe: Path, tmp_path: Path) -> None:
    directory = tmp_path / "directory.html"
    directory.mkdir()
    (tmp_path / "link").symlink_to(llama)
    for file, words in (
        (tmp_path / "absent" / "r.html", "is not a directory"),
        (llama / "LICENSE" / "r.html", "is not a directory"),
        (tmp_path / "r.txt", "does not end in .html"),
        (moe / "model.safetensors", "does not end in .html"),
        (directory, "is no regular file"),
        (llama / "r.html", "is left as it is"),
        (tmp_path / "link" / "r.html", "is left as it is"),
        (tmp_path / f"{'x' * 300}.html", "too long"),
        (Path("/proc/r.html"), "cannot write"),
    ):
        with pytest.raises(UpcycleError) as caught:
            ReportFile(file).check(llama)
        assert words in str(caught.value)
    ReportFile(moe / "r.html").check(llama)
    assert not (moe / "r.html").exists()


def test_it_is_refused_before_any_check(run_cli: RunCli, llama: Path, moe: Path) -> None:
    done = run_checked(run_cli, "verify", llama, moe, "--report", llama / "r.html")
    assert "is left as it is" in done.stderr.replace("\n", " ")
    assert done.stdout == ""
    assert not (llama / "r.html").exists()


def test_without_the_library(llama: Path, moe: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from upcycle_cli.__main__ import main\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "main()"
    )
    arguments = ["verify", llama, moe, "--report", tmp_path / "r.html"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'upcycle-cli[report]'" in done.stderr
    assert done.stderr.endswith("False\n")
    assert not (tmp_path / "r.html").exists()


def test_the_library_is_imported_for_a_report_only(llama: Path, moe: Path) -> None:
    code = (
        "import sys; from upcycle_cli.__main__ import main\n"
        "import atexit\n"
        "heavy = {'matplotlib', 'jinja2', 'torch'}\n"
        "atexit.register(lambda: print(sorted(heavy & {*sys.modules}), file=sys.stderr))\n"
        "main()"
    )
    for arguments in (["--help"], ["verify", "--help"], ["inspect", moe], ["inspect", llama]):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr.endswith("[]\n")


def test_the_commands_write_pages(run_cli: RunCli, llama: Path, moe: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.html"
    file.write_text("an older one")
    some = ("--checks", "directory")
    done = run_cli("verify", llama, moe, *some, "--report", file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "passed"
    assert "--checks directory" in parsed(file.read_text("utf-8")).text
    # Nothing else is left, and others may read it as far as the umask allows.
    assert os.listdir(tmp_path) == ["r.html"]  # noqa: PTH208
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask

    damaged = clone(moe, tmp_path / "damaged", num_local_experts=7)
    done = run_cli("verify", llama, damaged, *some, "--report", file)
    assert done.returncode == 1
    assert f"Wrote {file}." in done.stderr.replace("\n", "")
    assert "✗ failed" in parsed(file.read_text("utf-8")).text

    done = run_cli("inspect", moe, "--report", file, "--json")
    assert done.returncode == 0, done.stderr
    validate_json("inspect", done.stdout)
    assert "Inspection of a Mixture of Experts" in parsed(file.read_text("utf-8")).text
    run_checked(run_cli, "inspect", llama, "--report", file)


# Beside a model -----------------------------------------------------------------------------------


def test_a_report_beside_the_model_is_published(
    llama: Path, moe: Path, tmp_path: Path, found: Report
) -> None:
    model = clone(moe, tmp_path / "moe")
    (model / "verification.html").write_text("somebody's draft")
    manifest = read_manifest(open_checkpoint(model))
    assert "verification.html" not in manifest.files
    assert "verification.html" in manifest.left_out
    (model / "verification.html").write_text(html_of(replace(found, paths=(llama, model))), "utf-8")
    manifest = read_manifest(open_checkpoint(model))
    assert "verification.html" in manifest.files
    assert not manifest.failures
    again = verify(llama, model, checks=["directory"])
    assert again.status == "passed"
    assert again.checks[0].metrics["foreign_files"] == 0
    # It goes with the output that it is a report on.
    convert(llama, model, Recipe(expansion=4, granularity=2, top_k=2), overwrite=True)
    assert not (model / "verification.html").exists()


def test_the_card_leads_to_a_report(moe: Path) -> None:
    card = (moe / "README.md").read_text("utf-8")
    plain, linked = card_for_repo(card, "me/moe"), card_for_repo(card, "me/moe", with_report=True)
    assert "(verification.html)" not in plain
    assert linked.count("(verification.html)") == 1
    assert not is_edited(linked)
    assert card_for_repo(linked, "me/moe", with_report=True) == linked
    assert card_for_repo(linked, "me/moe") == plain


def test_numbers_of_a_card_lead_to_what_was_measured(llama: Path, tmp_path: Path) -> None:
    """Each check in the card's table leads to its place in the report, whose anchors are there."""
    model = tmp_path / "moe"
    convert(llama, model, Recipe(expansion=2, granularity=2, top_k=2), verify=True)
    card, page = (model / "README.md").read_text("utf-8"), html_of(verify(llama, model))
    linked = card_for_repo(card, "me/moe", with_report=True)
    for name in CHECK_NAMES:
        assert f"\n| {name} | passed |" in card
        assert f"\n| [{name}](verification.html#check-{name}) | passed |" in linked
        assert f'id="check-{name}"' in page
    assert card_for_repo(linked, "me/moe", with_report=True) == linked
    assert card_for_repo(linked, "me/moe") == card_for_repo(card, "me/moe")


# In a browser -------------------------------------------------------------------------------------


def test_in_a_browser(found: Report, moe: Path, tmp_path: Path) -> None:
    reason = "needs playwright and a chromium (apt-get install chromium)"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip(reason)
    files = {
        "verify.html": html_of(found, str(moe)),
        "hostile.html": _spoilt(HOSTILE[1], clone(moe, tmp_path / "moe")),
    }
    wide = [layer(number, experts=128) for number in range(126)]
    files["large.html"] = html_of(report_of(*wide))
    inspection = inspect(moe)
    files["inspect.html"] = inspection_html(inspection, name="x" * 300, command="upcycle inspect")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, html in files.items():
            (tmp_path / name).write_text(html, "utf-8")
            address = (tmp_path / name).as_uri()
            for width in (375, 1280):
                for scheme in ("light", "dark"):
                    _open(browser, address, width, scheme)
        browser.close()


def _open(browser: Any, address: str, width: int, scheme: str) -> None:  # noqa: ANN401
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    low = page.evaluate(CONTRASTS)
    assert low == []
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    page.close()


CONTRASTS = """() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = numbers(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own) continue;
    const style = getComputedStyle(element);
    const ink = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(numbers(ink)), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push([element.tagName, element.textContent.slice(0, 30), contrast]);
  }
  return low.slice(0, 5);
}"""


def test_all_checks_are_told_of() -> None:
    page = parsed(html_of(report_of(layer(0))))
    for name in set(CHECK_NAMES) - {"outputs"}:
        assert name in page.text
