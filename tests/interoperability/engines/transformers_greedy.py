"""Greedy text by transformers."""

from inspect import signature

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)
from worker import Job, answer_all


def run(job: Job) -> list[list[int]]:
    """Return the token ids of each continuation."""
    # AutoTokenizer chooses by the model type, whatever the files say; these are no released models.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
    config = AutoConfig.from_pretrained(job["model"], trust_remote_code=True)
    sees = getattr(config, "vision_config", None) is not None
    model, loading = (
        AutoModelForImageTextToText if sees else AutoModelForCausalLM
    ).from_pretrained(
        job["model"], dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    # A weight that is made up at random is no more than a warning to transformers.
    if loading["missing_keys"] or loading["unexpected_keys"]:
        missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
        raise ValueError(
            f"{len(missing)} weights missing, {len(unexpected)} not used: "
            f"{(missing + unexpected)[0]}"
        )
    asked = [
        {"input_ids": tokenizer(prompt, return_tensors="pt").input_ids} for prompt in job["prompts"]
    ]
    if picture := job["picture"]:
        from PIL import Image

        processor = AutoProcessor.from_pretrained(job["model"])
        processor.tokenizer = tokenizer
        image = Image.open(picture["file"])
        seen = processor(text=picture["text"], images=image, return_tensors="pt")
        known = signature(model.forward).parameters
        asked.append({key: value for key, value in seen.items() if key in known})
    texts = []
    for inputs in asked:
        ids = inputs["input_ids"]
        found = model.generate(
            **{**inputs, "attention_mask": torch.ones_like(ids)},
            max_new_tokens=job["tokens"],
            min_new_tokens=job["tokens"],
            do_sample=False,
        )
        texts.append(found[0, ids.shape[1] :].tolist())
    return texts


if __name__ == "__main__":
    answer_all(run)
