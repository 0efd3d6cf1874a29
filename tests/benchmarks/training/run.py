"""One arm with one seed: convert, train, look at the held-out text on the way."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from training.arms import ARMS, Arm
from training.measure import Distances, Load, Routers, watching
from training.scales import Scale
from training.text import Tokens, rows_of
from upcycle_cli import build_plan, convert, open_checkpoint
from upcycle_cli.training import tie_virtual_groups

LOWEST = 0.1  # of the peak, where a cosine ends
_WARMUP = 0.02
_EVALUATED_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all arms have in common."""

    scale: Scale
    dense: Path
    calibration: Path
    """A file of text."""
    tokens: Tokens
    """What nobody was trained on yet."""
    held_out: Tokens
    """Rows (R, context)."""
    scratch: Path
    device: str

    def flops(self, arm: Arm) -> float:
        """Return the FLOPs of training on a token, forward and back, by upcycle's own count.

        Two for a multiplication and an addition, and twice that again in the backward pass;
        attention scores are left out.
        """
        upcycled = arm if arm.recipe else Arm(name="any", recipe="E2G1T1")
        source = open_checkpoint(self.dense)
        moe, dense = build_plan(upcycled.to_recipe(0), source, target=upcycled.target).multiplied
        return 6.0 * (moe if arm.recipe else dense)


def run(bench: Bench, arm: Arm, seed: int) -> dict[str, Any]:
    """Return what was measured of an arm; the seed is that of the conversion and of the data."""
    started = time.monotonic()
    torch.manual_seed(seed)
    model = _model(bench, arm, seed)
    if arm.tied:
        tie_virtual_groups(model)
    flops = bench.flops(arm)
    longer = 1.0 if arm.flops_of is None else bench.flops(ARMS[arm.flops_of]) / flops
    steps = round(bench.scale.continued * longer / bench.scale.step)
    rows = rows_of(
        bench.tokens, bench.scale.context, seed=seed, count=steps * bench.scale.rows
    ).reshape(steps, bench.scale.rows, -1)
    peak = bench.scale.peak if arm.reset else bench.scale.peak * LOWEST
    with ExitStack() as stack:
        look = _Look(bench, arm, model, stack, flops)
        train(
            model,
            rows,
            rate=lambda done: cosine(done, peak) if arm.reset else peak,
            extra=look.balancing,
            device=bench.device,
            look=look.at,
            when={round(share * steps) for share in bench.scale.evaluations},
        )
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": arm.settings(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": flops,
        "seconds": round(time.monotonic() - started, 2),
        "curve": look.curve,
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
    extra: Callable[[], torch.Tensor | None] = lambda: None,
    look: Callable[[int], None] = lambda _: None,
    when: set[int] = frozenset(),  # type: ignore[assignment]
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
        added = extra()
        (loss if added is None else loss + added).backward()  # type: ignore[no-untyped-call]
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
    """Return the mean loss on rows (R, context); `after` hears of each batch."""
    model.eval()
    losses = []
    for start in range(0, len(rows), _EVALUATED_ROWS):
        batch = torch.from_numpy(rows[start : start + _EVALUATED_ROWS]).to(device)
        losses.append(float(language_loss(model, batch)) * len(batch))
        after()
    return sum(losses) / len(rows)


class _Look:
    """What is seen of a model on the way."""

    def __init__(
        self,
        bench: Bench,
        arm: Arm,
        model: Any,  # noqa: ANN401
        stack: ExitStack,
        flops: float,
    ) -> None:
        self.bench, self.arm, self.model, self.flops = bench, arm, model, flops
        self.curve: list[dict[str, Any]] = []
        self.routers: Routers | None = None
        if arm.recipe is not None:
            is_sigmoid = arm.convert.get("routing") == "sigmoid-topk"
            self.routers = stack.enter_context(watching(model, is_sigmoid=is_sigmoid))
            in_order = arm.convert.get("neuron_order") != "shuffled"
            self.distances = Distances(model, arm.granularity, ordered=in_order)

    def balancing(self) -> torch.Tensor | None:
        if self.routers is None:
            return None
        loss = self.arm.balancing * self.routers.balancing_loss(pooled=self.arm.pooled)
        self.routers.records.clear()
        return loss if self.arm.balancing else None

    def at(self, steps: int) -> None:
        tokens = steps * self.bench.scale.step
        found = {"tokens": tokens, "flops": tokens * self.flops}
        load, routers = Load(self.arm.granularity), self.routers
        after = (lambda: None) if routers is None else (lambda: load.add(routers))
        found["loss"] = held_out_loss(self.model, self.bench.held_out, self.bench.device, after)
        if routers is not None:
            found |= load.facts() | self.distances.facts()
        self.curve.append(found)


def _model(bench: Bench, arm: Arm, seed: int) -> Any:  # noqa: ANN401
    """Return what is trained: the dense model, or what upcycle converts it to."""
    if arm.recipe is None:
        return load_dense(bench.dense, bench.device)
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


def load_dense(path: Path, device: str) -> Any:  # noqa: ANN401
    """Return the dense model."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)


def seeds_first(arms: list[Arm], seeds: int) -> Iterator[tuple[Arm, int]]:
    """Yield what is to be run, such that what is cut short has whole seeds."""
    for seed in range(seeds):
        for arm in arms:
            yield arm, seed
