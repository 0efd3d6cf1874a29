"""Greedy text by vLLM: MODEL as argument, {"prompts", "tokens"} on stdin."""

import json
import sys

from transformers import PreTrainedTokenizerFast
from vllm import LLM, SamplingParams


def main() -> None:
    """Print the token ids of each continuation, as one line of JSON."""
    job = json.load(sys.stdin)
    # The tokenizer that is chosen by the model type is not that of these models.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
    prompts = [{"prompt_token_ids": tokenizer(prompt).input_ids} for prompt in job["prompts"]]
    model = LLM(
        sys.argv[1],
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=True,
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
    )
    found = model.generate(prompts, greedy, use_tqdm=False)
    print(json.dumps([list(request.outputs[0].token_ids) for request in found]))


# vLLM starts processes that import this file once more.
if __name__ == "__main__":
    main()
