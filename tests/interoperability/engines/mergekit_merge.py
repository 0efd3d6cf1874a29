"""A merge of a model with itself by mergekit: what comes out has to be what went in."""

import re
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from worker import Job, answer_all

MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


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
        run_merge(recipe, str(merged), MergeOptions(quiet=True))
        before, after = tensors(model), tensors(merged)
    wrong = sorted(
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not torch.equal(before[key], after[key])
    )
    return [wrong]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint in float32, by one name however it is stored.

    mergekit writes what transformers 5 holds in memory: the experts of a layer in two tensors, and
    Mixtral's under the names of the others.
    """
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                found |= split(key, file.get_tensor(key).float())
    return found


def split(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a tensor holds by the names that split experts have."""
    key = key.replace(".block_sparse_moe.", ".mlp.")
    key = re.sub(r"(?<=\.)w[123](?=\.weight$)", lambda name: MIXTRAL[name[0]], key)
    found = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", key)
    if found is None:
        return {key: tensor}
    names = ["gate_proj", "up_proj"] if found[2] == "gate_up_proj" else ["down_proj"]
    return {
        f"{found[1]}.{index}.{name}.weight": part
        for index, expert in enumerate(tensor)
        for name, part in zip(names, expert.chunk(len(names)), strict=True)
    }


if __name__ == "__main__":
    answer_all(run)
