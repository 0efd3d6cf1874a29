"""Log likelihoods by lm-eval on a task that is made on the spot."""

import json
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast
from worker import Job, answer_all

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


def run(job: Job) -> list[list[float]]:
    """Return the accuracy, and each log likelihood."""
    # The tokenizer that is chosen by the model type is not that of these models.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
    model = HFLM(
        pretrained=job["model"],
        tokenizer=tokenizer,
        dtype="float32",
        device="cpu",
        trust_remote_code=True,
    )
    with tempfile.TemporaryDirectory(prefix="upcycle-lm-eval-") as name:
        folder = Path(name)
        lines = [
            json.dumps({"question": question, "choices": choices, "answer": answer})
            for question, choices, answer in QUESTIONS
        ]
        (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "task.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=["upcycle_questions"],
            task_manager=TaskManager(include_path=name),
            log_samples=True,
            bootstrap_iters=0,
        )
    accuracy = found["results"]["upcycle_questions"]["acc,none"]
    scores = [
        float(response[0])
        for sample in found["samples"]["upcycle_questions"]
        for response in sample["filtered_resps"]
    ]
    return [[accuracy], scores]


if __name__ == "__main__":
    answer_all(run)
