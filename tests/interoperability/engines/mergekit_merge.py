"""A merge of MODEL with itself by mergekit: what comes out has to be what went in."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

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
    """Return every tensor of a checkpoint in float32."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    return found


if __name__ == "__main__":
    main()
