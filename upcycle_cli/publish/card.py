"""The model card of a converted model: README.md, from the templates card.md and growth_card.md.

Names of sources may contain anything, so each is quoted for its context: no name can end a code
block, start a tag or run something in a shell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.card_metadata import is_edited, sealed, unsealed
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import REPORT_NAME
from upcycle_cli.core.text import any_of, printable, shell_line
from upcycle_cli.models.engines import Support
from upcycle_cli.models.shipped import CODE_NAME
from upcycle_cli.plan.facts import facts, training_warnings
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.texts import CalibrationText
from upcycle_cli.recipe.recipe import Promise

if TYPE_CHECKING:
    from upcycle_cli.verification.result import Report

_PATH = r'path = "([^"]+)"'  # the line of the loading code that names the model
_SERVING = {
    "vLLM": ("vllm serve {location}{trust}",),
    "llama.cpp": (
        "hf download {location} --local-dir model",
        "python convert_hf_to_gguf.py model --outfile model.gguf  # in llama.cpp's repository",
        "llama-server --model model.gguf",
    ),
}
"""The commands on the card, which tests/interoperability/serving.py runs."""
_FUNCTION = {
    Promise.EXACT: "Before further training it computes the same function as the original.",
    Promise.APPROXIMATE: "Before further training it computes nearly the same function.",
    Promise.NONE: "It does not compute the same function as the original: train it before use.",
}
_AFTER_LINK = "To verify it yourself:"
_LINK = f"[{REPORT_NAME}]({REPORT_NAME}) has figures by layer and by token.\n\n"
_MAX_REPO_NAME = 96


def model_card(plan: Plan, report: Report | None, repo: str | None = None) -> str:
    """Return the text of the card; `report` is the verification, `repo` where the model will be."""
    if plan.growing is None:
        template, made, title = "card.md", plan.recipe.name, f" {plan.recipe.name}"
        own = _fields_of_upcycling(plan)
    else:
        k = plan.growing.expand
        template, made, title = "growth_card.md", f"x{k}", f", each expert {k} times"
        own = {"expand": k}
    short_name = "+".join(part.name.rpartition("/")[2] for part in plan.source.base_and_adapter)
    shown = {"architecture": plan.target.architecture} | facts(plan)
    location = repo or f"my-org/{repo_name(short_name, f'-{made}')}"
    text = Template((files(__package__) / template).read_text(encoding="utf-8")).substitute(
        own,
        front_matter=_front_matter(plan),
        title=_markdown(short_name) + title,
        origin=any_of(map(_origin, plan.sources), "and"),
        function=_FUNCTION[plan.promise],
        facts="\n".join(f"| {key} | {_markdown(text)} |" for key, text in shown.items()),
        results=_results(report),
        verify_command=shell_line(verify_command(plan, location)),
        location=json.dumps(location),
        parallel=any_of([n for n in range(1, plan.num_experts + 1) if plan.num_experts % n == 0]),
        engines="\n".join(f"| {engine.name} | {engine.words} |" for engine in plan.engines),
        serving=_serving(plan, location),
    )
    return sealed(text.strip())


def _fields_of_upcycling(plan: Plan) -> dict[str, object]:
    """Return the fields of card.md that growth_card.md does not have."""
    ships_code, wrapped = plan.target.ships_code, plan.target.inside is not None
    experts = "The experts of a layer are copies; training makes them different."
    if plan.merge is not None:
        experts = "Training teaches the routers which model's experts a token needs."
    about_code = (
        f"transformers has no Mixture of Experts for {plan.source.config['model_type']}, so the "
        f"model ships its code in `{CODE_NAME}`, which `trust_remote_code=True` lets transformers "
        "run. `upcycle verify` checks that it is the code that upcycle writes."
    )
    notes = [f"\n- Note: {text[0].lower()}{text[1:]}" for text in training_warnings(plan)]
    return {
        "pronoun": "its" if plan.merge is None else "their",
        "experts": experts,
        "options": ", trust_remote_code=True" if ships_code else "",
        "model_class": f"AutoModelFor{'ImageTextToText' if wrapped else 'CausalLM'}",
        "reader": "AutoProcessor" if wrapped else "AutoTokenizer",
        "reads": "processor" if wrapped else "tokenizer",
        "tokenizer": "processor.tokenizer" if wrapped else "tokenizer",  # some need a picture
        "about_code": f"\n\n{about_code}" if ships_code else "",
        "trainers": _trainers(plan),
        "notes": "".join(notes),
    }


def verify_command(plan: Plan, moe: str, *, paths: bool = False) -> Iterator[str]:
    """Yield the words of the command that verifies an output; `paths` names local files."""
    dense, *others = (_named(source, paths=paths) for source in plan.sources)
    yield from ("upcycle", "verify", dense, moe)
    for other in others:
        yield from ("--experts-from", other)
    rows, text = plan.inputs.rows, plan.inputs.text
    if rows is not None:
        yield from ("--router-init", str(rows.path) if paths else "FILE")
    if isinstance(text, CalibrationText) and text.path is not None:
        yield from ("--calibration", str(text.path) if paths else "FILE")
    if plan.promise is Promise.NONE:
        yield "--allow-inexact"


def _named(source: Checkpoint, *, paths: bool) -> str:
    """Return a source as `verify` takes it; `paths` names local files."""
    parts = source.base_and_adapter
    return "+".join(each.location if paths or each.repo else each.name for each in parts)


def repo_name(text: str, suffix: str = "") -> str:
    """Return a valid name for a repo on the Hub that is as similar to `text` as possible."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rsplit("/", maxsplit=1)[-1])
    text = re.sub(r"([-.])[-.]+", r"\1", text)
    return (text[: _MAX_REPO_NAME - len(suffix)].strip("-.") or "model") + suffix


def card_for_repo(card: str, repo: str, *, with_report: bool = False) -> str:
    """Return the card with `repo` in its commands and code, and a link to a report.

    An edited card is returned unchanged.
    """
    found = re.search(_PATH, card)
    if found is None or is_edited(card):
        return card
    text = unsealed(card)
    old = rf"(?<![\w./-]){re.escape(found[1])}(?![\w./-])"
    text = re.sub(old, lambda _: repo, text).replace(_LINK, "")
    if with_report:
        text = text.replace(_AFTER_LINK, _LINK + _AFTER_LINK, 1)
    return sealed(text)


def _front_matter(plan: Plan) -> str:
    import yaml  # type: ignore[import-untyped]

    # The Hub refuses a card whose base model is not a repo id.
    repos = (part.repo for each in plan.sources for part in each.base_and_adapter)
    named = [*dict.fromkeys(filter(None, repos))]
    base: dict[str, object] = {"base_model": named[0]} if named else {}
    if len(named) > 1:
        base = {"base_model": named, "base_model_relation": "merge"}
    tags = ["moe", "mixture-of-experts", "upcycling", plan.target.outer_type]
    values: dict[str, object] = {**base, **plan.card_metadata.values}
    task = "text-generation" if plan.target.inside is None else "image-text-to-text"
    values |= {"library_name": "transformers", "pipeline_tag": task, "tags": tags}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _markdown(text: str) -> str:
    """Return markdown that shows a text literally."""
    text = re.sub(r"([\\`*{}\[\]|~$]|\b_|_\b)", r"\\\1", printable(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _origin(source: Checkpoint) -> str:
    """Return the name of a source, with its commit if it comes from the Hub."""
    if source.adapter is not None:
        return " and its adapter ".join(map(_origin, source.base_and_adapter))
    name, commit = printable(source.name), source.revision
    if commit is not None:  # repo ids and commits need no quoting
        return f"[{name}](https://huggingface.co/{name}/tree/{commit}) (commit `{commit[:12]}`)"
    # Inline code stands between more backticks than it has in a row.
    longest = max(map(len, re.findall("`+", name)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {name} {fence}" if longest else f"`{name}`"


def _results(report: Report | None) -> str:
    if report is None:
        return "The conversion was not verified when it was made."
    text = (
        "The results of `upcycle verify` for these files:\n\n"
        "| check | result | detail |\n|---|---|---|"
    )
    for check in report.checks:
        detail = _markdown(" ".join(check.detail.split()))
        text += f"\n| {check.name} | {check.status} | {detail} |"
    return text


def _trainers(plan: Plan) -> str:
    lines = [
        f"{trainer.name}: {trainer.settings}. Master weights: {trainer.precision}."
        if trainer.support is Support.RUNS
        else f"{trainer.name}: {trainer.words}"
        for trainer in plan.trainers
    ]
    return "\n".join(f"- {line}" for line in lines or ["none was tested"])


def _serving(plan: Plan, location: str) -> str:
    trust = " --trust-remote-code" if plan.target.ships_code else ""
    fields, text = {"location": shell_line([location]), "trust": trust}, ""
    for engine in plan.engines:
        if engine.support is Support.RUNS and engine.name in _SERVING:
            lines = "\n".join(_SERVING[engine.name]).format(**fields)
            text += f"\n\nTo serve it with {engine.name}:\n\n```sh\n{lines}\n```"
    return text
