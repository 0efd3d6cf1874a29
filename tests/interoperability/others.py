"""lm-eval and mergekit with a model, in their own environments: `python others.py NAME`.

Each function imports its software and returns what runs a job of upcycle_cli/run/engine_runner.py:
the scores of lm-eval are its log-probabilities, the tensors that mergekit changes its text.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
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


def by_lm_eval() -> Run:
    """Return the accuracy and log likelihoods of lm-eval on a task that is made on the spot."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    def run(job: Job) -> dict[str, Any]:
        # AutoTokenizer chooses one by the model type, whatever the files say.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
        settings = {"dtype": "float32", "device": "cpu", "trust_remote_code": True}
        model = HFLM(pretrained=job["model"], tokenizer=tokenizer, **settings)
        with tempfile.TemporaryDirectory(prefix="upcycle-lm-eval-") as name:
            questions = Path(name) / "questions.jsonl"
            keys = ("question", "choices", "answer")
            lines = [json.dumps(dict(zip(keys, each, strict=True))) for each in QUESTIONS]
            questions.write_text("\n".join(lines) + "\n")
            (Path(name) / "task.yaml").write_text(TASK.format(file=questions))
            scored = lm_eval.simple_evaluate(
                model=model,
                tasks=["upcycle_questions"],
                task_manager=TaskManager(include_path=name),
                log_samples=True,
                bootstrap_iters=0,
            )
        samples = scored["samples"]["upcycle_questions"]
        scores = [float(each[0]) for sample in samples for each in sample["filtered_resps"]]
        accuracy = scored["results"]["upcycle_questions"]["acc,none"]
        return {"texts": [], "logprobs": [[accuracy], scores]}

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

    def run(job: Job) -> dict[str, Any]:
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
        changed = sorted(absent | {k for k in both if not torch.equal(before[k], after[k])})
        return {"texts": [changed], "margins": [[]], "logprobs": None}

    return run


SOFTWARE: dict[str, Callable[[], Run]] = {"lm-eval": by_lm_eval, "mergekit": by_mergekit}

if __name__ == "__main__":
    answer_all(SOFTWARE[sys.argv[1]]())
