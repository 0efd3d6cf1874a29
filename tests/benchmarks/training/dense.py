"""The dense model that all arms go on from, and the tokens that are left for them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from training.run import Bench, cosine, held_out_loss, load_dense, train
from training.scales import Scale
from training.text import Text, Tokens, read_text, rows_of, tokens_of, train_tokenizer


def prepare(
    scale: Scale, work: Path, folder: Path | None, device: str
) -> tuple[Bench, dict[str, Any]]:
    """Return what the arms need, made where it is not there yet, and facts for the results."""
    text = read_text(folder)
    settings = json.loads(json.dumps({"scale": asdict(scale), "text": text.facts()}))
    noted, saved = work / "dense.json", work / "tokens.npz"
    facts = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    if facts.get("settings") != settings:
        work.mkdir(parents=True, exist_ok=True)
        (work / "calibration.txt").write_text(text.calibration, encoding="utf-8")
        tokenizer = _make_tokenizer(scale, work / "dense", text)
        tokens = {
            "training": tokens_of(tokenizer, text.training),
            "held_out": tokens_of(tokenizer, text.held_out),
        }
        np.savez(saved, training=tokens["training"], held_out=tokens["held_out"])
        found = _make_dense(scale, work / "dense", tokens, device)
        facts = {"settings": settings, "dense": found}
        noted.write_text(json.dumps(facts), encoding="utf-8")
    with np.load(saved) as tokens:
        training, held_out = tokens["training"], tokens["held_out"]
    bench = Bench(
        scale=scale,
        dense=work / "dense",
        calibration=work / "calibration.txt",
        tokens=training[scale.pretraining :],
        held_out=_held_out(held_out, scale),
        scratch=work,
        device=device,
    )
    counted = {"training_tokens": len(training), "held_out_tokens": bench.held_out.size}
    return bench, {"text": settings["text"] | counted, "dense": facts["dense"]}


def _held_out(tokens: Tokens, scale: Scale) -> Tokens:
    return rows_of(tokens, scale.context, seed=0, count=scale.held_out // scale.context)


def _make_tokenizer(scale: Scale, path: Path, text: Text) -> Any:  # noqa: ANN401
    """Write the tokenizer; of SmolLM2, the model too."""
    if scale.dense is None:
        from smollm2 import make_smollm2

        make_smollm2(path)
        return AutoTokenizer.from_pretrained(path)
    tokenizer = train_tokenizer(text, scale.dense["vocab_size"])
    tokenizer.save_pretrained(path)
    return tokenizer


def _make_dense(scale: Scale, path: Path, tokens: dict[str, Tokens], device: str) -> dict[str, Any]:
    """Write the dense model; return what pretraining came to."""
    if scale.dense is None:
        model = load_dense(path, device)
    else:
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**scale.dense)).to(device)
        steps = scale.pretraining // scale.step
        rows = rows_of(
            tokens["training"][: scale.pretraining],
            scale.context,
            seed=0,
            count=steps * scale.rows,
        )
        train(
            model,
            rows.reshape(steps, scale.rows, -1),
            rate=lambda done: cosine(done, scale.pretraining_peak),
            device=device,
        )
        model.save_pretrained(path)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": held_out_loss(model, _held_out(tokens["held_out"], scale), device),
    }
