"""Greedy text by MLX."""

from itertools import islice

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.generate import generate_step
from transformers import PreTrainedTokenizerFast
from worker import Job, answer_all


def run(job: Job) -> list[list[int]]:
    """Return the token ids of each continuation."""
    model, _ = load(job["model"])
    # The tokenizer that is chosen by the model type is not that of these models.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    texts = []
    for prompt in job["prompts"]:
        ids = mx.array(tokenizer(prompt).input_ids)
        steps = generate_step(ids, model, max_tokens=job["tokens"])
        texts.append([int(token) for token, _ in islice(steps, job["tokens"])])
    return texts


if __name__ == "__main__":
    answer_all(run)
