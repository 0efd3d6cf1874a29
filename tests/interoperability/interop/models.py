"""What is converted: a real llama, tiny models of the other types, and every way to write each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[3]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HEAD_DIM = 32  # vLLM refuses 16
TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
RANDOM: Mapping[str, Mapping[str, Any]] = {
    "mistral": {**TINY, "sliding_window": None},
    "qwen2": TINY,
    "qwen3": TINY,
    "olmo2": TINY,
    "nemotron": TINY,
    "nemotron_h": {
        **TINY,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": HEAD_DIM,
        "ssm_state_size": 32,
        "n_groups": 2,
    },
}
"""By model type; the other one, llama, is SmolLM2-135M."""

# Of nemotron_h: what releases call its layers, and the keys that a dense one has not.
BLOCKS = {"linear_attention": "M", "mlp": "-", "full_attention": "*"}
ONLY_WITH_EXPERTS = ("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")

EXACT, PLAIN, SIGMOID = "topk-softmax", "softmax-topk", "sigmoid-topk"
ROUTINGS: Mapping[str, tuple[str, ...]] = {
    "mixtral": (EXACT,),
    "qwen2_moe": (EXACT, PLAIN),
    "qwen3_moe": (EXACT, PLAIN),
    "glm4_moe": (SIGMOID,),
    "nemotron_h": (SIGMOID,),
    "upcycled": (EXACT, SIGMOID, PLAIN),
}
PAIRS = (
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "mixtral"),
    ("mistral", "qwen2_moe"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
)
RECIPES = ("E8G1T2", "E8G8T8")
SCALED_PAIRS = (
    ("llama", "glm4_moe"),
    ("qwen2", "glm4_moe"),
    ("qwen3", "glm4_moe"),
    ("nemotron_h", "nemotron_h"),
    ("olmo2", "upcycled"),
    ("nemotron", "upcycled"),
)
"""Their configs have a factor for the gates; it matters where experts are parts of an MLP."""
SCALED_RECIPE = "E4G2T4"


@dataclass(frozen=True)
class Case:
    """A conversion: one row of the table."""

    dense: str
    target: str
    recipe: str
    routing: str
    options: tuple[str, ...] = ()
    control: bool = False
    """Whether it is made to compute something else, so that all who run it must disagree."""

    @property
    def name(self) -> str:
        """Identify it in the table."""
        parts = [f"{self.dense} → {self.target}", self.recipe, self.routing, *self.options]
        return ", ".join(parts)


def native_routing(case: Case) -> str:
    """Return what the released models of the target use."""
    return PLAIN if case.target == "qwen2_moe" else ROUTINGS[case.target][0]


def cases() -> list[Case]:
    """Return every native pair, both granularities and routings, and the special layouts."""
    found = [
        Case(dense, target, recipe, routing)
        for dense, target in PAIRS
        for routing in ROUTINGS[target]
        for recipe in RECIPES
    ]
    found += [
        Case(dense, target, SCALED_RECIPE, routing)
        for dense, target in SCALED_PAIRS
        for routing in ROUTINGS[target]
    ]
    untied = ("--untie-embeddings",)
    found += [Case("llama", "mixtral", "E8G1T2", EXACT, untied)]
    found += [Case("llama", "qwen2_moe", recipe, PLAIN, untied) for recipe in RECIPES]
    found += [Case("llama", "glm4_moe", SCALED_RECIPE, SIGMOID, untied)]
    fused = ("--expert-layout fused",)
    single = (("mistral", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"))
    found += [Case(dense, target, "E8G8T8", EXACT, fused) for dense, target in single]
    found += [Case("qwen2", "qwen2_moe", "E8G8T8", PLAIN, fused)]
    found += [
        Case(dense, target, SCALED_RECIPE, SIGMOID, fused)
        for dense, target in (("qwen3", "glm4_moe"), ("nemotron_h", "nemotron_h"))
    ]
    unscaled = ("--scaling none",)
    found += [
        Case(dense, target, "E8G8T8", ROUTINGS[target][-1], unscaled, control=True)
        for dense, target in single
    ]
    found += [
        Case(dense, target, SCALED_RECIPE, ROUTINGS[target][0], unscaled, control=True)
        for dense, target in SCALED_PAIRS
        if dense not in ("llama", "qwen2", "olmo2")
    ]
    # A norm behind the MLP takes every factor out: only other experts make a difference.
    found += [Case("olmo2", "upcycled", "E4G2T3", EXACT, ("--allow-inexact",), control=True)]
    return found


def quick_cases() -> list[Case]:
    """Return what CI has the time for: whole and split experts, and one that must differ."""
    return [
        Case("mistral", "mixtral", "E8G1T2", EXACT),
        Case("qwen2", "qwen2_moe", "E8G8T8", EXACT),
        Case("qwen3", "qwen3_moe", "E8G8T8", EXACT),
        Case("qwen3", "qwen3_moe", "E8G8T8", EXACT, ("--scaling none",), control=True),
        Case("qwen3", "glm4_moe", SCALED_RECIPE, SIGMOID),
        Case("nemotron", "upcycled", SCALED_RECIPE, SIGMOID),
        Case("olmo2", "upcycled", SCALED_RECIPE, EXACT),
    ]


def make_dense(model_type: str, directory: Path, smollm2: Path) -> Path:
    """Return a dense checkpoint of this type, made when it is not there yet."""
    path = directory / model_type
    if not path.exists():
        if model_type in RANDOM:
            _save_random(path, model_type, smollm2)
        else:
            shutil.copytree(smollm2, path)
        _write_for_all(path)
    return path


def _write_for_all(path: Path) -> None:
    """Say what a released model says, and transformers 5 does not write for older readers."""
    changes: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "config.json": {},
    }
    config = json.loads((path / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        changes["config.json"]["rope_theta"] = rope["rope_theta"]
    if blocks := config.get("layers_block_type"):
        changes["config.json"]["num_hidden_layers"] = len(blocks)
        changes["config.json"]["hybrid_override_pattern"] = "".join(BLOCKS[kind] for kind in blocks)
    for name, change in changes.items():
        content = json.loads((path / name).read_text()) | change
        # transformers writes settings of experts for a model that has none.
        content = {key: value for key, value in content.items() if key not in ONLY_WITH_EXPERTS}
        (path / name).unlink()
        (path / name).write_text(json.dumps(content, indent=2))


def _save_random(path: Path, model_type: str, smollm2: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dense = json.loads((smollm2 / "config.json").read_text())
    tokens = {key: dense[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(model_type, **RANDOM[model_type], **tokens)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Large enough for every part of the model to matter to the text.
        scale, mean = (0.2, 1.0) if "norm" in name else (0.15, 0.0)
        parameter.data = mean + scale * noise
    model.save_pretrained(path)
    for name in TOKENIZER_FILES:
        if (smollm2 / name).is_file():
            shutil.copy(smollm2 / name, path)


def margin(dense: Path, prompt: str, text: Sequence[int], position: int) -> float:
    """Return by how many nats the dense model prefers a token of a text to the next best."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    ids = torch.tensor([[*tokenizer(prompt).input_ids, *text[:position]]])
    with torch.no_grad():
        logits_V = model(ids).logits[0, -1]
    token = logits_V[text[position]].item()
    logits_V[text[position]] = -torch.inf
    return float(token - logits_V.max().item())


def convert(dense: Path, output: Path, case: Case) -> dict[str, Any]:
    """Convert by the command line; returns what `--json` printed."""
    options = [word for option in case.options for word in option.split()]
    command = [
        *(sys.executable, "-m", "upcycle_cli", "convert", str(dense), str(output), "--json"),
        *("--recipe", case.recipe, "--target", case.target, "--routing", case.routing),
        *("--no-fsync", *options),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
