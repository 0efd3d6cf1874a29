"""Greedy text by transformers."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from worker import Job, answer_all


def run(job: Job) -> list[list[int]]:
    """Return the token ids of each continuation."""
    # AutoTokenizer chooses by the model type, whatever the files say; these are no released models.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
    model, loading = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    # A weight that is made up at random is no more than a warning to transformers.
    if loading["missing_keys"] or loading["unexpected_keys"]:
        missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
        raise ValueError(
            f"{len(missing)} weights missing, {len(unexpected)} not used: "
            f"{(missing + unexpected)[0]}"
        )
    texts = []
    for prompt in job["prompts"]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job["tokens"],
            min_new_tokens=job["tokens"],
            do_sample=False,
        )
        texts.append(found[0, ids.shape[1] :].tolist())
    return texts


if __name__ == "__main__":
    answer_all(run)
