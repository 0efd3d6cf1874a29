"""Greedy text by vLLM; with `transformers` as argument, through its Transformers backend."""

import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its engine in the fork, not in one more

from transformers import PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from worker import Job, answer_all


def run(job: Job) -> list[list[int]]:
    """Return the token ids of each continuation."""
    # The tokenizer that is chosen by the model type is not that of these models.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
    picture = job["picture"]
    prompts = [{"prompt_token_ids": tokenizer(prompt).input_ids} for prompt in job["prompts"]]
    if picture:
        from PIL import Image

        prompts.append(
            {
                "prompt_token_ids": tokenizer(picture["text"]).input_ids,
                "multi_modal_data": {"image": Image.open(picture["file"])},
            }
        )
    model = LLM(
        job["model"],
        model_impl=(sys.argv[1:] or ["auto"])[0],
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        skip_tokenizer_init=not picture,
        trust_remote_code=True,
        **({"limit_mm_per_prompt": {"image": 1, "video": 0}} if picture else {}),
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
    )
    found = model.generate(prompts, greedy, use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in found]


# vLLM may start processes that import this file once more.
if __name__ == "__main__":
    answer_all(run)
