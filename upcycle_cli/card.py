"""The model card of a converted model: README.md with front matter for the Hub.

Names in it are somebody else's: each is quoted for the place where it stands, so that none ends a
block of code, starts a tag or gives a shell something else to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

from upcycle_cli.advice import no_promise, training_notes
from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.engines import Support
from upcycle_cli.front_matter import body, read_front_matter
from upcycle_cli.plan import Plan
from upcycle_cli.printable import printable, shell_line
from upcycle_cli.recipe import Promise, Routing

if TYPE_CHECKING:
    from upcycle_cli.verification import Report

_PAPER = "https://arxiv.org/abs/2410.07524"
_PLACE = r'path = "([^"]+)"'
"""Where the loading code says that the model is."""
_SERVING = {
    "vLLM": ("python -m vllm.entrypoints.openai.api_server --model {place}",),
    "llama.cpp": (
        "hf download {place} --local-dir model",
        "python convert_hf_to_gguf.py model --outfile model.gguf",
        "python -m llama_cpp.server --model model.gguf",
    ),
}
"""What tests/interoperability/serving.py runs, as the card prints it."""
_LONGEST_NAME = 96  # of a repo on the Hub


def model_card(plan: Plan, report: Report | None, repo: str | None = None) -> str:
    """Return the card's whole text; `report` is what verify found, if it ran.

    `repo` is where the model will be, if that is known. The licence and languages are carried over
    from the source's own card.
    """
    place = repo or f"my-org/{repo_name(plan.source.name, f'-{plan.recipe.name}')}"
    sections = (
        _title(plan),
        _what_it_is(plan),
        _verification(plan, report, place),
        _loading(place),
        _training(plan),
        _engines(plan, place),
        _citation(),
    )
    card = f"---\n{_front_matter(plan)}---\n\n" + "\n\n".join(sections)
    return f"{card}\n\n{_seal(card)}\n"


def repo_name(text: str, suffix: str = "") -> str:
    """Return a name that a repo on the Hub can have, as much like `text` as it may be."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rsplit("/", maxsplit=1)[-1])
    text = re.sub(r"([-.])[-.]+", r"\1", text)
    return (text[: _LONGEST_NAME - len(suffix)].strip("-.") or "model") + suffix


def for_repo(card: str, repo: str) -> str:
    """Return a card that names `repo` as the model's place; one that was edited as it is."""
    found = re.search(_PLACE, card)
    if found is None or is_edited(card):
        return card
    text, _, _ = card.strip().rpartition("\n\n")
    old = rf"(?<![\w./-]){re.escape(found[1])}(?![\w./-])"
    text = re.sub(old, lambda _: repo, text)
    return f"{text}\n\n{_seal(text)}\n"


def is_edited(card: str) -> bool:
    """Whether somebody has written or changed a card since `model_card` made it."""
    text, _, seal = card.strip().rpartition("\n\n")
    if seal == _seal(text):
        return False
    try:
        read_front_matter(card, ())
    except UpcycleError:
        return True  # what cannot be read was not written here
    # Metadata only is what the Hub makes for a repo with a licence.
    return bool(body(card).strip())


def _seal(card: str) -> str:
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"<!-- Made by upcycle; a push replaces this card unless it was edited: {digest} -->"


def _front_matter(plan: Plan) -> str:
    import yaml  # type: ignore[import-untyped]

    # A local directory is no repo id, and the Hub refuses a card that names one as its base.
    base = {"base_model": plan.source.name} if "/" in plan.source.name else {}
    values = base | {
        **plan.carried.values,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "mixture-of-experts", "upcycling", plan.family.target.model_type],
    }
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


def _title(plan: Plan) -> str:
    name, commit = plan.source.name, plan.source.revision
    origin = _code(name)
    if commit is not None:
        url = f"https://huggingface.co/{name}"  # of these, both have nothing to quote
        origin = f"[{name}]({url}), commit [`{commit[:12]}`]({url}/tree/{commit}),"
    return (
        f"# {_markdown(name.split('/')[-1])} {plan.recipe.name}\n\n"
        f"A Mixture of Experts made from {origin} by copying its MLPs into experts "
        f"and adding routers, with upcycle, by the "
        f"method of [Upcycling Large Language Models into Mixture of Experts]({_PAPER})."
    )


def _what_it_is(plan: Plan) -> str:
    recipe, factors = plan.recipe, plan.factors
    size = plan.family.decoder.intermediate_size // recipe.granularity
    rows = (
        ("recipe", (f"{recipe.name}: expansion {recipe.expansion}, granularity "
                   f"{recipe.granularity}, top-k {recipe.top_k}")),
        ("architecture", f"{plan.family.target.architecture}, from {plan.family.dense.model_type}"),
        ("experts", (f"{recipe.num_experts} per layer, {recipe.top_k} active, "
                    f"intermediate size {size}")),
        ("routing", (f"{recipe.routing}, router logits of standard deviation "
                    f"{recipe.router_logit_std:g}, seed {recipe.seed}")),
        ("parameters", (f"{_billions(plan.total_parameters)} in all, "
                       f"{_billions(plan.active_parameters)} active per token "
                       f"(dense: {_billions(plan.dense_parameters)})")),
        ("scale factors", (f"gate {factors.gate:g}, up {factors.up:g}, down {factors.down:g}"
                          f" ({'lossless' if plan.lossless else 'rounded'})")),
    )  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    rounding = f", its weights rounded to {plan.rounded_to}" if plan.rounded_to else ""
    promises = {
        Promise.EXACT: (
            f"It computes what the dense model computes{rounding}, until it is trained further."
        ),
        Promise.APPROXIMATE: (
            "It computes what the dense model computes up to an error of the order of the "
            "router's logits, until it is trained further."
        ),
        Promise.NONE: f"It does not compute what the dense model computes: {no_promise(recipe)}.",
    }
    return f"| | |\n|---|---|\n{table}\n\n{promises[plan.promise]}"


def _verification(plan: Plan, report: Report | None, place: str) -> str:
    found = "Not verified when it was made."
    if report is not None:
        rows = "\n".join(
            f"| {check.name} | {check.status} | {_markdown(' '.join(check.detail.split()))} |"
            for check in report.checks
        )
        found = (
            "What `upcycle verify` found on these files:\n\n"
            f"| check | result | detail |\n|---|---|---|\n{rows}"
        )
    pinned = ("--dense-revision", plan.source.revision) if plan.source.revision else ()
    again = shell_line(["upcycle", "verify", plan.source.repo or "DENSE", place, *pinned])
    return f"## Verification\n\n{found}\n\nTo verify it yourself:\n\n```sh\n{again}\n```"


def _loading(place: str) -> str:
    return (
        "## Loading\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"path = {json.dumps(place)}\n"
        'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\n```"
    )


def _training(plan: Plan) -> str:
    recipe = plan.recipe
    pre_softmax = recipe.routing is Routing.SOFTMAX_TOPK
    lines = [
        (
            "The model is a starting point: its experts are copies and differentiate in training. "
            f"What the [paper]({_PAPER}) found to work:"
        ),
        "",
        "- Reset the learning rate to the pretraining peak and decay it by a cosine.",
        "- Use batches of about 4M tokens.",
        (
            "- Use a load-balancing (auxiliary) loss of 1e-2; without one, experts die. "
            "A z-loss had no effect."
        ),
        (
            "- Do not drop tokens by a capacity factor at the start: a dropped token loses its "
            "MLP, which breaks the equality with the dense model."
        ),
        "",
        "Settings of common trainers:",
        "",
        (
            "- transformers: `model.config.output_router_logits = True`, or the auxiliary loss is "
            "not applied; its weight is `router_aux_loss_coef`, 0.01 here."
        ),
        (
            f"- Megatron-LM: {'' if pre_softmax else 'no '}`--moe-router-pre-softmax`, "
            f"`--moe-router-topk {recipe.top_k}`, `--moe-aux-loss-coeff 1e-2`, "
            "no `--moe-expert-capacity-factor`."
        ),
    ]
    advice = list(training_notes(plan))
    if advice:
        lines += ["", *(f"Note: {text[0].lower()}{text[1:]}" for text in advice)]
    return "## Training\n\n" + "\n".join(lines)


def _engines(plan: Plan, place: str) -> str:
    rows = "\n".join(f"| {engine.name} | {engine.support} |" for engine in plan.engines)
    parts = [
        "## Inference engines\n\nWhat is known of this architecture with this routing; an engine "
        f"that is not listed was not tried.\n\n| engine | |\n|---|---|\n{rows}"
    ]
    for engine in plan.engines:
        if engine.support is Support.RUNS and engine.name in _SERVING:
            lines = "\n".join(_SERVING[engine.name]).format(place=shell_line([place]))
            parts.append(f"To serve it with {engine.name}:\n\n```sh\n{lines}\n```")
    return "\n\n".join(parts)


def _citation() -> str:
    return (
        "## Citation\n\n```bibtex\n@article{he2024upcycling,\n"
        "  title = {Upcycling Large Language Models into Mixture of Experts},\n"
        "  author = {He, Ethan and others},\n"
        "  journal = {arXiv preprint arXiv:2410.07524},\n  year = {2024}\n}\n```"
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
