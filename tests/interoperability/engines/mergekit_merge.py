"""A merge of a model with itself by mergekit: what comes out has to be what went in."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from worker import Job, answer_all


def run(job: Job) -> list[list[str]]:
    """Return the names of the tensors that are missing or changed."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    model = Path(job["model"]).resolve()
    with tempfile.TemporaryDirectory(prefix="upcycle-mergekit-") as name:
        twin, merged = Path(name) / "twin", Path(name) / "merged"
        twin.symlink_to(model)  # it refuses one model twice
        recipe = MergeConfiguration.model_validate(
            {
                "merge_method": "linear",
                "dtype": "float32",
                "models": [
                    {"model": str(each), "parameters": {"weight": 0.5}} for each in (model, twin)
                ],
            }
        )
        run_merge(recipe, str(merged), MergeOptions(quiet=True, trust_remote_code=True))
        before, after = tensors(model), tensors(merged)
    wrong = sorted(
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not torch.equal(before[key], after[key])
    )
    return [wrong]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by the name that transformers has for it in memory.

    mergekit writes these names, and not those of releases.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    found: dict[str, torch.Tensor] = dict(model.state_dict())
    for key in loading["missing_keys"]:  # was made up
        del found[key]
    return found


if __name__ == "__main__":
    answer_all(run)
