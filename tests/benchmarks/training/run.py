"""One arm with one seed: convert, train, look at the held-out text on the way."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from training.arms import ARMS, Arm
from training.data import Bench, Tokens, rows_of
from training.measure import Distances, Load, watch_routers
from upcycle_cli import build_plan, convert, open_checkpoint
from upcycle_cli.training import tie_virtual_groups

LOWEST = 0.1  # of the peak, where a cosine ends
_WARMUP = 0.02
_EVALUATED_ROWS = 32


def run(bench: Bench, arm: Arm, seed: int) -> dict[str, Any]:
    """Return the measurements of an arm; the seed is for the conversion and the data."""
    started = time.monotonic()
    torch.manual_seed(seed)
    scale, model, curve = bench.scale, _make_model(bench, arm, seed), list[dict[str, Any]]()
    if arm.tied:
        tie_virtual_groups(model)
    flops = _flops(bench, arm)
    longer = 1.0 if arm.flops_of is None else _flops(bench, ARMS[arm.flops_of]) / flops
    steps = round(scale.continued * longer / scale.step)
    rows = rows_of(bench.tokens, scale.context, steps * scale.rows, seed=seed)
    peak = scale.peak if arm.reset else scale.peak * LOWEST
    is_sigmoid = arm.convert.get("routing") == "sigmoid-topk"
    ordered = arm.convert.get("neuron_order") != "shuffled"
    distances = Distances(model, arm.granularity, ordered=ordered) if arm.recipe else None
    watching = watch_routers(model, is_sigmoid=is_sigmoid) if arm.recipe else nullcontext()

    with watching as routers:

        def balancing() -> torch.Tensor | float:
            if routers is None:
                return 0.0
            loss = arm.balancing * routers.balancing_loss(pooled=arm.pooled)
            routers.records.clear()
            return loss if arm.balancing else 0.0

        def look(done: int) -> None:
            tokens, load = done * scale.step, Load(arm.granularity)
            after = (lambda: None) if routers is None else (lambda: load.add(routers))
            loss = held_out_loss(model, bench.held_out, bench.device, after)
            curve.append({"tokens": tokens, "flops": tokens * flops, "loss": loss})
            if distances is not None:
                curve[-1] |= load.facts() | distances.facts()

        train(
            model,
            rows.reshape(steps, scale.rows, -1),
            rate=lambda done: cosine(done, peak) if arm.reset else peak,
            extra=balancing,
            device=bench.device,
            look=look,
            when={round(share * steps) for share in scale.evaluations},
        )
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": asdict(arm),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": flops,
        "seconds": round(time.monotonic() - started, 2),
        "curve": curve,
    }


def cosine(done: float, peak: float) -> float:
    """Return the learning rate after a share of the steps: a short rise, then a cosine."""
    if done < _WARMUP:
        return peak * (done + 1e-3) / (_WARMUP + 1e-3)
    turn = math.cos(math.pi * (done - _WARMUP) / (1 - _WARMUP))
    return peak * (LOWEST + (1 - LOWEST) * (1 + turn) / 2)


def train(
    model: Any,  # noqa: ANN401 - transformers has no types
    rows: Tokens,
    *,
    rate: Callable[[float], float],
    device: str,
    extra: Callable[[], torch.Tensor | float] = lambda: 0.0,
    look: Callable[[int], None] = lambda _: None,
    when: Collection[int] = (),
) -> None:
    """Train on rows (steps, rows, context), and look at what came of it after some of the steps."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    if 0 in when:
        look(0)
    for step, batch in enumerate(rows):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate(step / len(rows))
        loss = language_loss(model, torch.from_numpy(batch).to(device))
        (loss + extra()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in when:
            look(step + 1)


def language_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Return the mean loss of the next token in nats, without what the model may add to it."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(
    model: Any,  # noqa: ANN401
    rows: Tokens,
    device: str,
    after: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean loss on rows (R, context); `after` is called after each batch."""
    model.eval()
    losses = []
    for start in range(0, len(rows), _EVALUATED_ROWS):
        batch = torch.from_numpy(rows[start : start + _EVALUATED_ROWS]).to(device)
        losses.append(float(language_loss(model, batch)) * len(batch))
        after()
    return sum(losses) / len(rows)


def _flops(bench: Bench, arm: Arm) -> float:
    """Return the FLOPs of training on a token, forward and back, by upcycle's own count.

    Two for a multiplication and an addition, and twice that again in the backward pass; attention
    scores are left out.
    """
    upcycled = arm if arm.recipe else Arm(name="any", recipe="E2G1T1")
    source = open_checkpoint(bench.dense)
    moe, dense = build_plan(upcycled.to_recipe(0), source, target=upcycled.target).multiplied
    return 6.0 * (moe if arm.recipe else dense)


def _make_model(bench: Bench, arm: Arm, seed: int) -> Any:  # noqa: ANN401
    """Return what is trained: the dense model, or what upcycle converts it to."""
    if arm.recipe is None:
        model = AutoModelForCausalLM.from_pretrained(bench.dense, dtype=torch.float32)
        return model.to(bench.device)
    moe = bench.scratch / "moe"
    shutil.rmtree(moe, ignore_errors=True)
    convert(
        bench.dense,
        moe,
        arm.to_recipe(seed),
        target=arm.target,
        calibration=bench.calibration if arm.calibrated else None,
    )
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32, trust_remote_code=True)
    model.set_experts_implementation("grouped_mm")  # several times as fast for many experts
    shutil.rmtree(moe)
    return model.to(bench.device)
