"""`upcycle demo`: make a small dense model, and run the other commands on it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import typer  # noqa: TC002 - it reads the annotations of a command
from rich.text import Text

from upcycle_cli.cli import options
from upcycle_cli.cli.terminal import print_json, stderr, talk
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import shell_line

_NEXT_STEPS = """
The MoE computes what the dense model computes.
Try your own model (a directory, or ORG/NAME on the Hub):

  upcycle inspect MODEL --gpu-memory 80GB
  upcycle convert MODEL moe --recipe E8G1T2 --verify
"""


@options.declared
def demo(context: typer.Context, directory: Path | None = None, json: bool = False) -> None:
    """Make a small dense model, convert it to E8G1T2 and verify the result; needs no network."""
    folder = directory or Path(tempfile.mkdtemp(prefix="upcycle-demo-"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UpcycleError(f"{folder} exists and is not empty.", "Choose another directory.")
    dense, moe = str(folder / "dense"), str(folder / "moe")
    if not json:
        talk(f"Making a small Llama with random weights in {dense} …")
    _make_dense(Path(dense))
    for arguments in (["convert", dense, moe, "--recipe", "E8G1T2"], ["verify", dense, moe]):
        line = shell_line(["upcycle", *arguments])
        if not json:
            stderr().print(Text(f"\n$ {line}", style="bold"), soft_wrap=True)
        code = context.find_root().command.main(
            [*arguments, "--quiet"] if json else arguments,
            standalone_mode=False,
            auto_envvar_prefix="UPCYCLE_DEMO",  # ignore variables that are set for real commands
        )
        if code:
            raise UpcycleError(f"`{line}` failed with exit code {code}.")
    if json:
        print_json({"status": "passed", "directory": str(folder)})
    else:
        talk(*_NEXT_STEPS.splitlines(), "", f"The demo's files stay in {folder}.")


def _make_dense(path: Path) -> None:
    """Write a Llama of 4 layers with random weights, and its tokenizer."""
    import torch

    from upcycle_cli.plan.texts import builtin_texts
    from upcycle_cli.run.models import transformers_errors

    with transformers_errors():
        from tokenizers.implementations import ByteLevelBPETokenizer
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        texts = [text for text in builtin_texts() if isinstance(text, str)]
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(
            texts, vocab_size=2048, special_tokens=[*special.values()], show_progress=False
        )
        inner: Any = trained._tokenizer  # noqa: SLF001
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
        tokenizer.save_pretrained(path)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        # Embeddings of the usual size make a random model repeat the current token; larger MLPs
        # make the experts' output matter.
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                matrix.weight.data *= 3
        model.save_pretrained(path)
