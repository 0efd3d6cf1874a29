"""What trainers are given, which trainers, and what their answers come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_table import header, row

from interop.conversions import PLAIN, Case
from interop.models import file_name, make_model, write_as_released
from interop.results import NOT_TRIED, Cell
from interop.software import Software
from interop.wrapped import WRAPPED, make_wrapped
from upcycle_cli.models.engines import DIFFERS, SAME

TOLERANCE, APPROXIMATE = 1e-4, 1e-3  # of a loss in float32; of softmax-topk
VOCABULARY = 1024
TOKENS: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
_TRANSFORMERS = ("transformers>=5", "torch", "accelerate")


def _trainer(script: str, name: str, *packages: str, **settings: Any) -> Software:  # noqa: ANN401
    return Software(name, packages, f"trainers/{script}.py", **settings)


TRAINERS = (
    _trainer("hf_trainer", "transformers", *_TRANSFORMERS),
    _trainer("trl_sft", "TRL", "trl", "peft", *_TRANSFORMERS),
    _trainer("peft_lora", "peft", "peft", *_TRANSFORMERS),
    _trainer(
        *("torchtitan_qwen3", "torchtitan", "torchtitan", "torch", "triton"),
        targets=("qwen3_moe",),
    ),
    _trainer(
        *("nemo_automodel_loss", "NeMo AutoModel", "nemo-automodel", "torch"),
        unwanted=("triton",),  # newer than its kernels, which it does without
    ),
    _trainer(
        *("olmo_core_flex", "OLMo-core", "ai2-olmo-core[transformers]", "torch"),
        targets=("flex_olmo",),
    ),
    _trainer(
        *("megatron_bridge", "Megatron-Bridge", *_TRANSFORMERS),
        *("hydra-core", "omegaconf", "einops", "triton"),
        bare=("megatron-bridge", "megatron-core"),  # they ask for kernels for CUDA
        targets=("qwen3_moe", "glm4_moe"),  # deepseek_v3 needs attention of Transformer Engine
    ),
)
STOPPED: Mapping[str, str] = {
    "prime-rl": "is not on PyPI, and wants Python 3.12, vLLM and kernels for CUDA",
}
"""What could not be run without a GPU, and what stopped it."""


def make_dense(name: str, directory: Path) -> Path:
    """Return a dense checkpoint without a tokenizer, made when it is not there yet."""
    path = directory / file_name(name)
    if not path.exists():
        make = make_wrapped if name in WRAPPED else make_model
        make(name, TOKENS).save_pretrained(path)
        write_as_released(path, name)
    return path


def judge(answer: Mapping[str, Any], dense_loss: float, case: Case) -> Cell:
    """Return whether a first loss is the dense model's, and whether tensors come back unchanged."""
    allowed = APPROXIMATE if case.routing == PLAIN else TOLERANCE
    if not abs(answer["loss"] - dense_loss) < allowed:
        return Cell(DIFFERS, f"a first loss of {answer['loss']:.4f} for {dense_loss:.4f}")
    if answer["wrong"]:
        wrong = answer["wrong"]
        return Cell(DIFFERS, f"{len(wrong)} tensors do not come back, as {wrong[0]}")
    return Cell(SAME)


Answers = Mapping[Case, Mapping[str, Mapping[str, Any]]]


def measured_tables(answers: Answers) -> list[str]:
    """Return what was measured besides, as lines of Markdown: balancing, biases, LoRA."""
    honest = {case: row for case, row in answers.items() if not (case.control or case.options)}
    others: dict[str, list[str]] = {}
    for case, cells in honest.items():
        for name, answer in cells.items():
            measured = [
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in answer["measured"].items()
                if key not in ("added", "reached") and value is not None
            ]
            if measured:
                others.setdefault(f"{name}: {'; '.join(measured)}", []).append(case.name)
    return [
        "What balancing adds to the first loss (T = 4, coefficient 0.01):",
        "",
        *_table(honest, "added", ("transformers", "TRL"), lambda value: f"{value:.3f}"),
        "",
        "Correction bias after a step, and other findings:",
        "",
        *(f"- {text} ({'; '.join(names)})" for text, names in others.items()),
        "",
        "LoRA: adapters that learn, of all adapters:",
        "",
        *_table(honest, "reached", ("peft",), _reached),
    ]


def _reached(parts: Mapping[str, Sequence[int]]) -> str:
    found = [f"{part} {learn}/{there}" for part, (there, learn) in parts.items()]
    return ", ".join(found) or "nothing"


def _table(
    answers: Answers, key: str, names: Sequence[str], shown: Callable[[Any], str]
) -> list[str]:
    first = {
        name: next((row[name] for row in answers.values() if name in row), None) for name in names
    }
    columns = [
        (name, column)
        for name, answer in first.items()
        if answer is not None
        for column in answer["measured"][key]
    ]
    lines = [header("conversion", *(f"{name}: {column}" for name, column in columns))]
    for case, cells in answers.items():
        found = (
            cells.get(name, {}).get("measured", {}).get(key, {}).get(column)
            for name, column in columns
        )
        lines.append(row(case.name, *(NOT_TRIED if v is None else shown(v) for v in found)))
    return lines
