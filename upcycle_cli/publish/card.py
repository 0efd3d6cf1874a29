"""The model card of a converted model: `card.md`, filled in; README.md with front matter.

Names in it are somebody else's: each is quoted for the place where it stands, so that none ends a
block of code, starts a tag or gives a shell something else to do.
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
from upcycle_cli.models.trainers import expert_parallel_sizes, trainers
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.plan.facts import facts, why_no_promise
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.warnings import training_warnings
from upcycle_cli.recipe.recipe import ExpertLayout, NeuronOrder, Promise, Routing

if TYPE_CHECKING:
    from upcycle_cli.verification.result import Report

_PLACE = r'path = "([^"]+)"'  # where the loading code says that the model is
_SERVING = {
    "vLLM": ("python -m vllm.entrypoints.openai.api_server --model {place}",),
    "llama.cpp": (
        "hf download {place} --local-dir model",
        "python convert_hf_to_gguf.py model --outfile model.gguf",
        "python -m llama_cpp.server --model model.gguf",
    ),
}
"""What tests/interoperability/serving.py runs, as the card prints it."""
_BEFORE_LINK = "To verify it yourself:"
_LINK = f"Figures by layer and by token are in [{REPORT_NAME}]({REPORT_NAME}).\n\n"
_CHECK = re.compile(
    r"^\| \[?(?P<name>\w+)(?:\]\([^)]*\))? (?=\| (?:passed|failed|measured|skipped) \|)",
    re.MULTILINE,
)
"""The name of a check in the table of what was found, with or without a link."""
_LONGEST_NAME = 96  # of a repo on the Hub


def model_card(plan: Plan, report: Report | None, repo: str | None = None) -> str:
    """Return the card's text; `report` is what verify found, `repo` where the model will be."""
    if plan.expansion is None:
        template, made, title = "card.md", plan.recipe.name, f" {plan.recipe.name}"
        own = _upcycled(plan)
    else:
        k = plan.expansion.growth.expand
        template, made, title = "growth_card.md", f"x{k}", f", each expert {k} times"
        own = {"expand": k}
    place = repo or f"my-org/{repo_name(plan.source.name, f'-{made}')}"
    text = Template((files(__package__) / template).read_text(encoding="utf-8")).substitute(
        own,
        front_matter=_front_matter(plan),
        title=_markdown(plan.source.name.split("/")[-1]) + title,
        origin=_origins(plan),
        facts="\n".join(f"| {key} | {value} |" for key, value in _facts(plan).items()),
        promise=_promise(plan),
        found=_found_text(report),
        verify_again=shell_line(_verify_again(plan, place)),
        place=json.dumps(place),
        parallel=any_of(expert_parallel_sizes(plan.num_experts)),
        engines=_engines_text(plan, place),
    )
    return sealed(text.strip())


def _upcycled(plan: Plan) -> dict[str, object]:
    """Return what the card of an upcycled model says, and that of a grown one does not."""
    ships_code, wrapped = plan.target.ships_code, plan.target.inside is not None
    notes = "\n".join(f"Note: {text[0].lower()}{text[1:]}" for text in training_warnings(plan))
    return {
        "whose": "its" if plan.merge is None else "their",
        "experts": _experts(plan),
        "options": ", trust_remote_code=True" if ships_code else "",
        "model_class": f"AutoModelFor{'ImageTextToText' if wrapped else 'CausalLM'}",
        "reader": "AutoProcessor" if wrapped else "AutoTokenizer",
        "reads": "processor" if wrapped else "tokenizer",
        "code": _about_code(plan) if ships_code else "",
        "trainers": _trainers(plan),
        "score": _score(plan),
        "top_k": plan.top_k,
        "notes": f"\n\n{notes}" if notes else "",
    }


def _verify_again(plan: Plan, place: str) -> Iterator[str]:
    unnamed = "SOURCE" if plan.expansion else "DENSE"
    yield from ("upcycle", "verify", plan.source.repo or unnamed, place)
    if plan.source.revision:
        yield from ("--dense-revision", plan.source.revision)
    if plan.merge is not None:
        for other in plan.merge.others:
            yield from ("--experts-from", other.name if other.repo is None else other.location)
        yield "--allow-inexact"


def repo_name(text: str, suffix: str = "") -> str:
    """Return a name that a repo on the Hub can have, as much like `text` as it may be."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rsplit("/", maxsplit=1)[-1])
    text = re.sub(r"([-.])[-.]+", r"\1", text)
    return (text[: _LONGEST_NAME - len(suffix)].strip("-.") or "model") + suffix


def card_for_repo(card: str, repo: str, *, with_report: bool = False) -> str:
    """Return a card that names `repo` as the model's place; one that was edited as it is.

    With a report, it leads to that of a verification beside it, each check to what it measured.
    """
    found = re.search(_PLACE, card)
    if found is None or is_edited(card):
        return card
    text = unsealed(card)
    old = rf"(?<![\w./-]){re.escape(found[1])}(?![\w./-])"
    text = re.sub(old, lambda _: repo, text).replace(_LINK, "")
    link = rf"[\g<name>]({REPORT_NAME}#check-\g<name>)" if with_report else r"\g<name>"
    text = _CHECK.sub(rf"| {link} ", text)
    if with_report:
        text = text.replace(_BEFORE_LINK, _LINK + _BEFORE_LINK, 1)
    return sealed(text)


def _front_matter(plan: Plan) -> str:
    import yaml  # type: ignore[import-untyped]

    # A local directory is no repo id, and the Hub refuses a card that names one as its base.
    named = [source.name for source in plan.sources if "/" in source.name]
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
    """Return a text as markdown that shows it."""
    text = re.sub(r"([\\`*{}\[\]|~$]|\b_|_\b)", r"\\\1", printable(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    """Return a text as code inside a line, between more backticks than it has in a row."""
    text = printable(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def _origins(plan: Plan) -> str:
    """Return the names of the sources, and their commits where they are known."""
    *others, last = map(_origin, plan.sources)
    listed = ", ".join(other.removesuffix(",") for other in others)
    return f"{listed} and {last}" if others else last


def _origin(source: Checkpoint) -> str:
    name, commit = source.name, source.revision
    if commit is None:
        return _code(name)
    url = f"https://huggingface.co/{name}"  # of these, both have nothing to quote
    return f"[{name}]({url}), commit [`{commit[:12]}`]({url}/tree/{commit}),"


def _facts(plan: Plan) -> dict[str, str]:
    """Return the rows of the card's table: what convert printed, and the model's class."""
    shown = {"architecture": plan.target.architecture} | facts(plan)
    return {key: _markdown(text) for key, text in shown.items() if key != "promise"}


def _promise(plan: Plan) -> str:
    origin = "source" if plan.expansion else "dense model"
    if plan.promise is Promise.NONE:
        return f"It does not compute what the {origin} computes: {why_no_promise(plan)}."
    rounding = f", its weights rounded to {plan.rounded_to}" if plan.rounded_to else ""
    if plan.promise is Promise.APPROXIMATE:
        rounding = " up to an error of the order of the router's logits"
    return f"It computes what the {origin} computes{rounding}, until it is trained further."


def _experts(plan: Plan) -> str:
    """Say how far experts differ from the beginning."""
    if plan.merge is not None:
        return "its routers learn which model's experts a token needs"
    if plan.recipe.perturbed:
        return "its experts differ a little already, and differentiate further"
    copies = plan.recipe.neuron_order in (NeuronOrder.SLICED, NeuronOrder.CLUSTERED)
    if copies or plan.recipe.group_size == 1:
        return "its experts are copies and differentiate"
    return "its experts hold the dense MLP's neurons in other combinations, and differentiate"


def _found_text(report: Report | None) -> str:
    if report is None:
        return "Not verified when it was made."
    found = (
        "What `upcycle verify` found on these files:\n\n| check | result | detail |\n|---|---|---|"
    )
    for check in report.checks:
        detail = _markdown(" ".join(check.detail.split()))
        found += f"\n| {check.name} | {check.status} | {detail} |"
    return found


def _about_code(plan: Plan) -> str:
    model_type = plan.source.config["model_type"]
    return (
        f"\n\ntransformers has no Mixture-of-Experts class for {model_type}, so the code of "
        f"one lies beside the weights, in `{CODE_NAME}`, and `trust_remote_code=True` lets it "
        f"run. It is all that runs: the rest is transformers' own {model_type}. `upcycle "
        "verify` holds the file to what upcycle writes, letter by letter."
    )


def _score(plan: Plan) -> str:
    """Return the options with which Megatron-LM routes as the model does."""
    score = {
        Routing.SOFTMAX_TOPK: "`--moe-router-pre-softmax`",
        Routing.TOPK_SOFTMAX: "no `--moe-router-pre-softmax`",
        Routing.SIGMOID_TOPK: "`--moe-router-score-function sigmoid`",
    }[plan.recipe.routing or Routing.TOPK_SOFTMAX]
    if plan.factors.config != 1.0:
        score += f", `--moe-router-topk-scaling-factor {plan.factors.config:g}`"
    if plan.recipe.shared_experts:
        width = plan.recipe.shared_experts * plan.expert_size
        score += f", `--moe-shared-expert-intermediate-size {width}`"
    return score


def _trainers(plan: Plan) -> str:
    """Say of each trainer that is known to take the model what to set in it."""
    routing = plan.recipe.routing
    assert routing is not None
    found = trainers(
        plan.family.target,
        routing,
        tied=bool(text_config_of(plan.config).get("tie_word_embeddings", False)),
        fused=plan.expert_layout is ExpertLayout.FUSED,
        num_experts=plan.recipe.num_experts,
    )
    words = {
        trainer.name: f"{trainer.settings}. Master weights: {trainer.precision}."
        if trainer.support is Support.RUNS
        else trainer.support
        for trainer in found
    } or {"transformers": _balancing(plan)}
    return "\n".join(f"- {name}: {text}" for name, text in words.items())


def _balancing(plan: Plan) -> str:
    """Say how transformers balances the experts' load, if it does; for what was not trained."""
    weight = "its weight is `router_aux_loss_coef`, 0.01 here."
    if plan.family.target.ships_code:
        return f"the auxiliary loss, of each layer by itself, is applied in training; {weight}"
    wrapped = plan.family.target.inside is not None
    if wrapped and not plan.family.target.has_balancing_loss:
        return (
            f"a {plan.family.target.outer_type} adds no auxiliary loss, whatever is inside: a "
            "trainer has to, or convert with `--target upcycled`, whose own code does."
        )
    if "router_aux_loss_coef" not in text_config_of(plan.config):
        bias = plan.family.target.correction_bias
        if bias is None:
            return "it does not for this architecture: a trainer has to bring a way of its own."
        return (
            "it has no auxiliary loss for this architecture, whose released models were balanced "
            f"by the bias on the choice of experts (`{bias.name.rpartition('.')[2]}`): a trainer "
            "has to move it."
        )
    place = "model.config.text_config" if wrapped else "model.config"
    switch = f"`{place}.output_router_logits = True`"
    return f"{switch}, or the auxiliary loss is not applied; {weight}"


def _engines_text(plan: Plan, place: str) -> str:
    """Return what is known of each engine as rows of a table, and how to serve the model."""
    text = "\n".join(f"| {engine.name} | {engine.support} |" for engine in plan.engines)
    for engine in plan.engines:
        if engine.support is Support.RUNS and engine.name in _SERVING:
            trust = " --trust-remote-code" if plan.target.ships_code else ""
            lines = "\n".join(_SERVING[engine.name]).format(place=shell_line([place]) + trust)
            text += f"\n\nTo serve it with {engine.name}:\n\n```sh\n{lines}\n```"
    return text
