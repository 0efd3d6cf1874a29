"""What the tests of the engine share: small dense models, file systems in files, child processes.

Nothing here imports transformers, so that a child process starts as fast as the tool itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import forked
import numpy as np
import pytest
from measure import measure

import upcycle_cli
from upcycle_cli import Options, UpcycleError, api, build_plan, open_checkpoint
from upcycle_cli.core.callbacks import Hooks
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import Recipe
from upcycle_cli.write.distributed import Team
from upcycle_cli.write.staging import Staging
from upcycle_cli.write.writer import WriteOptions

ROOT = Path(upcycle_cli.__file__).parents[1]
PYTHON = sys.executable
SUBPROCESS_SECONDS = 300  # a hang ends in an error, not in a lost night

_T = TypeVar("_T")

# Dense models --------------------------------------------------------------------------------


def make_dense(
    path: Path,
    *,
    hidden: int = 64,
    inner: int = 128,
    layers: int = 2,
    vocab: int = 64,
    seed: int = 0,
    hollow: bool = False,
) -> Path:
    """Write a bfloat16 Llama; with `hollow`, only its norms have data, and it takes no space."""
    from shapes import write_hollow  # not for child processes: it imports torch

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": hidden // 2,
        "tie_word_embeddings": False,
    }
    write_hollow(path, config)
    (path / "LICENSE").write_text("Do as you like.\n")
    # Magnitudes from 2⁻⁷ to 2⁻³.
    fill(path, seed=seed, random_bits=0x81FF, only_norms=hollow)
    return path


def fill(path: Path, *, seed: int, random_bits: int, only_norms: bool = False) -> None:
    """Fill a hollow bfloat16 checkpoint: norms with ones, other weights with 2⁻⁷ and some bits."""
    random = np.random.default_rng(seed)
    for name, entry in open_checkpoint(path).tensors.items():
        length = entry.nbytes // 2
        stored = np.memmap(path / entry.shard, np.uint16, "r+", entry.offset, (length,))
        if "norm" in name:
            stored[:] = 0x3F80
        elif not only_norms:
            stored[:] = random.integers(0, 1 << 16, length, np.uint16) & random_bits | 0x3C00


def set_value(dense: Path, tensor: str, value: int) -> None:
    """Set the first element of a tensor to a bfloat16 given by its bits."""
    entry = open_checkpoint(dense).tensors[tensor]
    with (dense / entry.shard).open("r+b") as file:
        file.seek(entry.offset)
        file.write(value.to_bytes(2, "little"))


def plan_of(dense: Path, recipe: str = "E8G1T2", **options: Any) -> Plan:  # noqa: ANN401
    return build_plan(Recipe(recipe), open_checkpoint(dense), options=Options(**options))


def unique_bytes(plan: Plan) -> int:
    """The bytes of an output that shares the extents of all copies."""
    return plan.source.nbytes + sum(t.nbytes for t in plan.tensors if t.role == "router")


class Advance(Hooks):
    """Call a function with the bytes of each step of writing."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self._call = call

    def advance(self, num_bytes: int) -> None:
        self._call(num_bytes)


def execute(
    plan: Plan,
    output: Path,
    *,
    hooks: Hooks | None = None,
    team: Team | None = None,
    **options: Any,  # noqa: ANN401
) -> api.Conversion:
    """Write and publish a plan; `options` are those of a Request."""
    recipe = Recipe("E2G1T2")  # the plan has been made already
    request = api.Request(source=plan.source.path, output=output, recipe=recipe, **options)
    return api.execute(plan, request, hooks or Hooks(), team or Team())


def staging_in(plan: Plan, output: Path) -> Staging:
    """A directory to write a plan's weights into, without a transaction around it."""
    staging = Staging(output=output, plan=plan, durable=False)
    staging.path.mkdir(parents=True)
    return staging


def stopped_after(plan: Plan, output: Path, num_bytes: int) -> None:
    """Leave the partial of a run that an error of the disk ended after so many bytes."""
    left = num_bytes

    def stop(written: int) -> None:
        nonlocal left
        left -= written
        if left < 0:
            raise OSError(5, "stopped by the test")

    with pytest.raises(UpcycleError, match="stopped by the test"):
        execute(plan, output, hooks=Advance(stop), writing=WriteOptions(workers=1))
    assert not output.exists()


# What is in a directory ----------------------------------------------------------------------


def contents(path: Path) -> dict[str, str]:
    """Every file below a directory with the digest of its bytes."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[file.relative_to(path).as_posix()] = digest
    return found


# Child processes -----------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "PYTHONWARNINGS": ""} | more


def convert_command(dense: Path, output: Path, *options: str, recipe: str = "E8G1T2") -> list[str]:
    tool = [PYTHON, "-m", "upcycle_cli"]
    return [*tool, "convert", str(dense), str(output), "--recipe", recipe, *options]


def torchrun_command(ranks: int, command: list[str]) -> list[str]:
    """The same command under PyTorch's launcher."""
    launcher = [PYTHON, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(ranks), *command[1:]]


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(OMP_NUM_THREADS="1", **variables),
        start_new_session=True,
    )


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a fork if it is this tool or a program."""
    given = environment(OMP_NUM_THREADS="1", **variables)
    fork = partial(forked.run, environment=given, seconds=SUBPROCESS_SECONDS)
    match command:
        case [python, "-m", "upcycle_cli", *arguments] if python == PYTHON:
            return fork(arguments)
        case [python, "-c", program, *arguments] if python == PYTHON:
            return fork(arguments, program=program)
        case [python, "-m", "torch.distributed.run", *arguments] if python == PYTHON:
            return fork(arguments, program="from torch.distributed.run import main\nmain()\n")
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=given,
        timeout=SUBPROCESS_SECONDS,
    )


def wait_until(condition: Callable[[], _T], process: subprocess.Popen[str]) -> _T:
    """Look until a condition holds or the process has ended; return what it was then."""
    for _ in range(SUBPROCESS_SECONDS * 1000):
        found = condition()
        if found:
            return found
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.001)
            return condition()
    raise AssertionError("the condition never held")


# Memory --------------------------------------------------------------------------------------


def assert_equal_peaks(measures: Sequence[Callable[[], int]]) -> None:
    """Each of these takes as many bytes as the others, to 10 %.

    Who looks on a busy machine may miss a peak, but not in three runs of one.
    """
    peaks = [0] * len(measures)
    for _ in range(3):
        peaks = [max(peak, measure()) for peak, measure in zip(peaks, measures, strict=True)]
        if max(peaks) <= 1.10 * min(peaks):
            return
    pytest.fail(" and ".join(f"{peak / 1e6:.1f} MB" for peak in peaks))


def peak_anonymous_bytes(command: list[str]) -> int:
    return measure(command, environment(OMP_NUM_THREADS="1")).peak_anon_bytes


def peak_of_a_new(output: Path, command: list[str]) -> int:
    shutil.rmtree(output, ignore_errors=True)
    return peak_anonymous_bytes(command)
