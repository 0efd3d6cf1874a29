"""Greedy text by MLX: MODEL as argument, {"prompts", "tokens"} on stdin."""

import json
import sys
from itertools import islice

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.generate import generate_step
from transformers import PreTrainedTokenizerFast


def main() -> None:
    """Print the token ids of each continuation, as one line of JSON."""
    job = json.load(sys.stdin)
    model, _ = load(sys.argv[1])
    # The tokenizer that is chosen by the model type is not that of these models.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    texts = []
    for prompt in job["prompts"]:
        ids = mx.array(tokenizer(prompt).input_ids)
        steps = generate_step(ids, model, max_tokens=job["tokens"])
        texts.append([int(token) for token, _ in islice(steps, job["tokens"])])
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
