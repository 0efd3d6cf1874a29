"""The text, the tokenizer and the dense model that all arms go on from, made once and kept.

    apt-get install python3-doc

The text is the sources of Python's documentation: English with code, 11 MB in 500 files, under the
licence of the PSF. A file is held out as a whole, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "python3-doc"
HELD_OUT = 20  # one file of so many
END = "<|endoftext|>"
_CALIBRATION_CHARACTERS = 40_000

Tokens = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes are in tokens unless they say otherwise."""

    name: str
    dense: Mapping[str, Any] | None
    """The config of a dense qwen3 that is pretrained here; None for SmolLM2-135M."""
    context: int
    rows: int
    """Sequences of a step."""
    pretraining: int
    pretraining_peak: float
    """The learning rate that a cosine descends from, to a tenth."""
    continued: int
    peak: float
    """The same for the training that follows; that of pretraining, if it is known."""
    held_out: int
    evaluations: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """The shares of the steps after which the held-out loss is measured."""

    @property
    def step(self) -> int:
        """The tokens of a step."""
        return self.context * self.rows


_TINY = Scale(
    name="tiny",
    dense={
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    context=128,
    rows=8,
    pretraining=1_000_000,
    pretraining_peak=2e-3,
    continued=131_072,
    peak=2e-3,
    held_out=12_288,
)
_SMOLLM2 = Scale(
    name="smollm2",
    dense=None,
    context=512,
    rows=16,
    pretraining=0,
    pretraining_peak=0.0,
    continued=1_000_000,
    peak=3e-4,
    held_out=65_536,
)
SCALES: Mapping[str, Scale] = {scale.name: scale for scale in (_TINY, _SMOLLM2)}


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


def prepare(scale: Scale, work: Path, device: str) -> tuple[Bench, dict[str, Any]]:
    """Return what the arms need, made where it is not there yet, and facts for the results."""
    training, held_out = read_text()
    digest = hashlib.sha256("\0".join((*training, *held_out)).encode()).hexdigest()
    text = {
        "package": PACKAGE,
        "files": len(training) + len(held_out),
        "held_out_files": len(held_out),
        "bytes": sum(len(each.encode()) for each in (*training, *held_out)),
        "sha256": digest,
    }
    settings = json.loads(json.dumps({"scale": asdict(scale), "text": text}))
    noted, saved = work / "dense.json", work / "tokens.npz"
    facts = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    if facts.get("settings") != settings:
        work.mkdir(parents=True, exist_ok=True)
        calibration = "\n\n".join(training)[-_CALIBRATION_CHARACTERS:]
        (work / "calibration.txt").write_text(calibration, encoding="utf-8")
        tokenizer = _make_tokenizer(scale, work / "dense", training)
        tokens = {"training": _tokens(tokenizer, training), "held": _tokens(tokenizer, held_out)}
        np.savez(saved, training=tokens["training"], held=tokens["held"])
        found = _make_dense(scale, work / "dense", tokens["training"], tokens["held"], device)
        facts = {"settings": settings, "dense": found}
        noted.write_text(json.dumps(facts), encoding="utf-8")
    with np.load(saved) as stored:
        tokens = {name: stored[name] for name in ("training", "held")}
    bench = Bench(
        scale=scale,
        dense=work / "dense",
        calibration=work / "calibration.txt",
        tokens=tokens["training"][scale.pretraining :],
        held_out=rows_of(tokens["held"], scale.context, scale.held_out // scale.context, seed=0),
        scratch=work,
        device=device,
    )
    text |= {"training_tokens": len(tokens["training"]), "held_out_tokens": bench.held_out.size}
    return bench, {"text": text, "dense": facts["dense"]}


def read_text() -> tuple[list[str], list[str]]:
    """Return the package's files to train on, in random order, and the held-out ones."""
    # One version of Python may be there under several names.
    folder = next(iter(sorted(Path("/usr/share/doc").glob("python3.[0-9]*/html/_sources"))), None)
    if folder is None:
        raise SystemExit(f"{PACKAGE} is not installed. Run: apt-get install {PACKAGE}")
    texts = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.rst.txt")}
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    read = [texts[name].read_text(encoding="utf-8") for name in names]
    return [text for i, text in enumerate(read) if i % HELD_OUT], read[::HELD_OUT]


def _make_tokenizer(scale: Scale, path: Path, training: Sequence[str]) -> Any:  # noqa: ANN401
    """Write a byte-level BPE of the training text; of SmolLM2, the model and its own tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if scale.dense is None:
        from smollm2 import make_smollm2

        make_smollm2(path)
        return AutoTokenizer.from_pretrained(path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=scale.dense["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.save_pretrained(path)
    return fast


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Tokens:  # noqa: ANN401
    """Return the tokens of texts, each with an end."""
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*each.ids, tokenizer.eos_token_id]) for each in encoded])


def rows_of(tokens: Tokens, context: int, count: int, *, seed: int) -> Tokens:
    """Return `count` rows of `context` tokens (count, context) in an order drawn from the seed."""
    whole = tokens[: len(tokens) // context * context].reshape(-1, context)
    if count > len(whole):
        raise SystemExit(f"The text has {len(whole)} rows of {context} tokens, not {count}.")
    return whole[np.random.default_rng(seed).permutation(len(whole))[:count]]


def _make_dense(
    scale: Scale, path: Path, training: Tokens, held_out: Tokens, device: str
) -> dict[str, Any]:
    """Write the dense model; return what pretraining came to."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from training.run import cosine, held_out_loss, train

    if scale.dense is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    else:
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**scale.dense)).to(device)
        steps = scale.pretraining // scale.step
        rows = rows_of(
            training[: scale.pretraining], scale.context, steps * scale.rows, seed=0
        ).reshape(steps, scale.rows, -1)
        train(model, rows, rate=lambda done: cosine(done, scale.pretraining_peak), device=device)
        model.save_pretrained(path)
    rows = rows_of(held_out, scale.context, scale.held_out // scale.context, seed=0)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": held_out_loss(model, rows, device),
    }
