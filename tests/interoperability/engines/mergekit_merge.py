"""A merge of MODEL with itself by mergekit: what comes out has to be what went in."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
RECIPE = """\
merge_method: linear
dtype: float32
models:
  - {{model: {model}, parameters: {{weight: 0.5}}}}
  - {{model: {twin}, parameters: {{weight: 0.5}}}}
"""


def main() -> None:
    """Print the names of the tensors that are missing or changed, as one line of JSON."""
    model = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="upcycle-mergekit-") as name:
        recipe, merged = Path(name) / "merge.yml", Path(name) / "merged"
        twin = Path(name) / "twin"  # it refuses one model twice
        twin.symlink_to(model)
        recipe.write_text(RECIPE.format(model=model, twin=twin))
        program = str(Path(sys.executable).with_name("mergekit-yaml"))
        command = [program, "--quiet", str(recipe), str(merged)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"mergekit-yaml: {done.stderr.strip().splitlines()[-1]}")
        before, after = tensors(model), tensors(merged)
    wrong = sorted(
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not torch.equal(before[key], after[key])
    )
    print(json.dumps([wrong]))


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
    main()
