"""Outputs of a grown MoE: do it and its source, run by transformers' own code, predict the same?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.old_verification.distributions import Comparison, Ending, compare
from upcycle_cli.old_verification.grown import Grown
from upcycle_cli.old_verification.outputs import (
    exact_failures,
    rounding_failures,
    text_metrics,
    text_words,
)
from upcycle_cli.old_verification.prompts import Prompt, TextOptions, make_prompt
from upcycle_cli.old_verification.running import moe_model
from upcycle_cli.old_verification.sidebyside import ending_of
from upcycle_cli.run.layerwise import started
from upcycle_cli.run.models import Model, TransformersError, transformers_says
from upcycle_cli.verification.result import CheckResult, Findings, Status


def check_grown_outputs(
    facts: Grown, options: TextOptions, by_header: Sequence[str], watch: Watch
) -> CheckResult:
    """Compare the predictions of both; `by_header` is what headers show to be wrong.

    Raises UpcycleError when the source cannot run, and for options that no model can follow.
    """
    findings = Findings(by_header)
    note = "The outputs could not be compared."
    if findings:
        return findings.result("outputs", "", note=note)
    prompt = make_prompt(facts, options)
    with facts.dense.reader() as source, facts.moe.reader() as moe:
        try:
            comparison = _compared(facts, source, moe, prompt, watch)
        except TransformersError as error:
            findings.add(f"transformers could not run the MoE: {error}")
            return findings.result("outputs", "", note=note)
    bad = comparison.moe.not_finite
    if bad:
        findings.add(f"{bad} of {comparison.moe.shown} logits of the MoE are not finite")
        return findings.result("outputs", "", note=note)
    metrics = text_metrics(comparison, prompt)
    measured = text_words(metrics, prompt, "source")
    if facts.objection is not None:
        detail = f"Measured only, since this MoE does not promise equality: {facts.objection}."
        result = findings.result("outputs", f"{detail} {measured}", metrics)
        return replace(result, status=Status.MEASURED)
    findings.add(*exact_failures(metrics), *rounding_failures(metrics, "source's"))
    return findings.result(
        "outputs", f"The same function. {measured}", metrics, measured if findings else ""
    )


def _compared(
    facts: Grown, source: Reader, moe: Reader, prompt: Prompt, watch: Watch
) -> Comparison:
    narrow, layers = _narrowed(facts), len(facts.layers)
    try:
        models = [moe_model(facts.source, source)]
        if narrow:
            models.append(moe_model(facts.source, source, rounded=narrow))
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {facts.dense.path}: {error}") from error
    models.append(moe_model(facts.grown, moe))
    endings = []
    with ExitStack() as stack:
        for index, model in enumerate(models):
            endings.append(_ending(model, prompt, stack))
            watch.checked((index + 1) * layers, len(models) * layers, "layers")
        with transformers_says():
            return compare(endings[0], endings[1] if narrow else None, endings[-1], prompt.targets)


def _ending(model: Model, prompt: Prompt, stack: ExitStack) -> Ending:
    run = stack.enter_context(started(model, prompt.ids, ()))
    with transformers_says():
        while run.output is None:
            run.steps.advance()
        return ending_of(run)


def _narrowed(facts: Grown) -> Mapping[str, torch.dtype]:
    """Return the dtypes that weights were rounded to, by their names in the source."""
    found = {}
    for name, became in facts.became.items():
        dtype = facts.moe.tensors[became].dtype if became in facts.moe.tensors else "F32"
        if dtype not in {"F32", facts.dense.tensors[name].dtype}:
            found[name] = getattr(torch, TORCH_DTYPES[dtype])
    return found
