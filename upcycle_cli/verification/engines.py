"""The check `engine:NAME`: do both models compute the same in an inference engine?

run/engine_runner.py runs one model after the other, each in a process of the engine's Python.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.storage import CONFIG_NAME, WEIGHTS_NAME
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.text import choose_from
from upcycle_cli.models.wrappers import wrapper_of
from upcycle_cli.plan.output import OutputTensor, Role, Shard
from upcycle_cli.recipe.options import Promise
from upcycle_cli.run import engine_runner
from upcycle_cli.run.engine_runner import CONVERTER, ENGINES
from upcycle_cli.run.models import load_config, source_errors
from upcycle_cli.run.texts import longest_text
from upcycle_cli.verification.prompts import TextOptions, make_prompt
from upcycle_cli.verification.result import ENGINE, CheckResult, Findings, Status
from upcycle_cli.write.file_layout import lay_out
from upcycle_cli.write.record import json_bytes

if TYPE_CHECKING:
    from upcycle_cli.checkpoint.checkpoint import Checkpoint
    from upcycle_cli.verification.outputs import Expectation

Output = Mapping[str, Any]
"""What run/engine_runner.py answers: texts, margins and logprobs, each by row."""

ROUNDING = 1e-3
"""How far log-probabilities may differ by rounding in float32."""
HESITATION = 0.1
"""A hundred times the router's logits: how far softmax-topk may move log-probabilities."""
LOW_PRECISION = 0.25
"""How far bfloat16 may move log-probabilities on average; single ones move by four times that."""
_ENOUGH_TOKENS = 24
_ROWS, _LENGTH, _MOST_LENGTH, _TOKENS = 4, 128, 1024, 16
"""Rows of tokens, their usual and largest length, and how many tokens are generated after each."""
_SHORT_SIGHTED = re.compile(r'"(?:sliding_window|original_max_position_embeddings)": (\d+)')
"""Finds the length in a config beyond which attention or rotary embeddings change."""
_GPU_ROUNDING = 1e-2
"""The mean difference of log-probabilities that float32 may cause; GPUs may round to TF32."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How engines run both models."""

    engine_python: Path | None = None
    """The Python that has the engine; None for this one."""
    engine_dtype: str = "float32"
    """float32, or auto for the dtype of each checkpoint."""
    engine_timeout: int = 3600
    """How many seconds a model may take."""
    llama_cpp: Path | None = None
    """The directory of llama.cpp, with its convert_hf_to_gguf.py."""

    def check(self, names: Sequence[str]) -> None:
        """Raise UpcycleError for an unknown engine, or for one that this Python does not have."""
        if self.engine_dtype not in ("float32", "auto"):
            what = f"`engine_dtype` is {shown(self.engine_dtype)}."
            raise UpcycleError(what, "Use float32 or auto.")
        if self.engine_timeout < 1:
            raise UpcycleError(f"`engine_timeout` must be 1 or more, not {self.engine_timeout}.")
        for name in names:
            if name not in ENGINES:
                raise UpcycleError(f"'{name}' is not an engine.", choose_from(name, ENGINES))
            module, _ = ENGINES[name]
            program = f"from importlib import util; assert util.find_spec({module!r})"
            try:
                found = subprocess.run(  # noqa: S603 - the user's own Python
                    [self.python, "-c", program],
                    env=self._environment(),
                    capture_output=True,
                    check=False,
                )
            except OSError as error:
                hint = "Give the Python that has the engine by `engine_python`."
                raise UpcycleError(f"cannot run {self.python}: {error.strerror}.", hint) from error
            if found.returncode:
                package = f"{module.replace('_', '-')}{'-python' * (module == 'llama_cpp')}"
                raise UpcycleError(
                    f"the engine {name} is not installed: {self.python} has no {package}.",
                    f"Install it (pip install {package}), or name the Python that has it by "
                    "`engine_python`.",
                )
        if "llama.cpp" in names and not (self.llama_cpp and (self.llama_cpp / CONVERTER).is_file()):
            hint = "Give the directory of llama.cpp's sources, which has it, by `llama_cpp`."
            raise UpcycleError(f"the engine llama.cpp needs its {CONVERTER}.", hint)

    @property
    def python(self) -> str:
        """The interpreter."""
        return str(self.engine_python or sys.executable)

    def _environment(self) -> dict[str, str]:
        found = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if self.engine_python:
            found.pop("PYTHONPATH", None)  # it names packages of this Python
            # Engines look for their compilers there.
            folder = str(Path(self.python).absolute().parent)
            found["PATH"] = os.pathsep.join([folder, found.get("PATH", "")])
        return found

    def run(
        self, name: str, model: Path, rows: list[list[int]], *, trust: bool
    ) -> tuple[str, Output]:
        """Return the engine's version and what it answers; raises UpcycleError."""
        job = {"model": str(model), "rows": rows, "tokens": _TOKENS, "dtype": self.engine_dtype}
        job |= {"trust": trust, "picture": None, "llama_cpp": str(self.llama_cpp)}
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(  # noqa: S603 - likewise
                [self.python, engine_runner.__file__, name],
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            ) as process,
        ):
            try:
                found, _ = process.communicate(json.dumps(job).encode(), self.engine_timeout)
            except subprocess.TimeoutExpired:
                why = f"no answer in {self.engine_timeout} s; `engine_timeout` sets this limit"
                raise UpcycleError(why) from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also the processes that it started
            said.seek(0)
            reason = engine_runner.reason(said.read().decode(errors="replace"))
        if (code := process.returncode) == -signal.SIGKILL:
            reason = "the system killed it, most likely for lack of memory, of which `engine_dtype`"
            raise UpcycleError(f"{reason} auto needs half")
        if code:
            ended = f"it ended with {signal.Signals(-code).name}: " if code < 0 else ""
            raise UpcycleError(f"{ended}{reason}")
        try:
            version, output = map(json.loads, found.splitlines())
            lengths, texts = [1 + len(row) for row in output["logprobs"]], len(output["texts"])
        except (ValueError, TypeError, KeyError) as error:
            raise UpcycleError(f"it printed no answer, but {shown(found)}") from error
        if lengths != [*map(len, rows)] or texts not in (0, len(rows)):
            raise UpcycleError("it answered for other rows")
        return str(version), output


def check_engine(
    name: str,
    dense: Checkpoint,
    moe: Checkpoint,
    expected: Expectation,
    options: EngineOptions,
    texts: TextOptions,
    *,
    trust: bool,
) -> CheckResult:
    """Compare both models in an engine; `trust` lets it run the code that the MoE ships.

    The check is skipped if the engine cannot run one of the models.
    """
    with source_errors(dense.path):
        rows = _rows(dense, texts)
    check, what = ENGINE + name, expected.source
    try:
        with _plain_copy(dense) as path:
            version, wanted = options.run(name, path, rows, trust=False)
        what = "MoE"
        _, found = options.run(name, moe.path, rows, trust=trust)
    except UpcycleError as error:
        detail = f"{name} could not run the {what}: {error.message.rstrip('.')}."
        return CheckResult(name=check, status=Status.SKIPPED, detail=detail)
    held, made = ({each.dtype for each in model.tensors.values()} for model in (dense, moe))
    exact = expected.promise is Promise.EXACT and expected.is_lossless
    tolerance = _GPU_ROUNDING if exact else HESITATION
    if options.engine_dtype != "float32" or made - held:
        tolerance = LOW_PRECISION
    difference, metrics = compare(found, wanted, tolerance, on_average=True)
    total = metrics["text_tokens"]
    words = f"; {metrics['same_text_tokens']} of {total} greedy tokens are the same" * bool(total)
    measured = (
        f"{name} {version}, {options.engine_dtype}, {len(rows)} rows of {len(rows[0])} tokens: "
        f"log-probabilities differ by {metrics['logprob_diff_mean']:.2g} on average and "
        f"{metrics['logprob_diff_max']:.2g} at most{words}."
    )
    if expected.promise is Promise.NONE:
        detail = f"This MoE does not promise equality, so it was measured: {expected.reason}."
        return Findings().result(check, f"{detail} {measured}", metrics, is_measured=True)
    findings = Findings([difference] if difference else [])
    passed = f"Both models compute the same in this engine. {measured}"
    return findings.result(check, passed, metrics, measured if findings else "")


@contextmanager
def _plain_copy(source: Checkpoint) -> Iterator[Path]:
    """Yield the directory of a model; one whose weights are computed is copied while it is used."""
    if not source.made:
        yield source.path
        return
    from upcycle_cli.write.evaluate import evaluate_together  # it imports numpy

    tensors = (OutputTensor.of(name, source.tensor(name), Role.COPIED) for name in source.tensors)
    layout = lay_out(Shard(WEIGHTS_NAME, (*tensors,)))
    with tempfile.TemporaryDirectory(prefix="upcycle-source-") as folder, source.reader() as reader:
        path = Path(folder)
        (path / CONFIG_NAME).write_bytes(json_bytes(source.config))
        for each in source.companions:
            (path / each.name).parent.mkdir(exist_ok=True)
            (path / each.name).write_bytes(source.storage.companion(each))
        with (path / WEIGHTS_NAME).open("wb") as file:
            file.write(layout.header)
            for part in layout.parts:
                file.writelines(piece for _, piece in evaluate_together([part.expr], reader.mapped))
        yield path


def _rows(dense: Checkpoint, texts: TextOptions) -> list[list[int]]:
    """Return tokens of text, and random ones: beyond windows and original lengths that are short.

    A `context` gives one row of this length.
    """
    config = load_config(dense.path).get_text_config()
    longest = longest_text(config)
    held = map(int, _SHORT_SIGHTED.findall(json.dumps(dense.config)))
    limits = [limit + _LENGTH // 2 for limit in held if limit <= _MOST_LENGTH]
    length = max(2, min(max([_LENGTH, *limits]), longest - _TOKENS))
    texts = replace(texts, tokens=(_ROWS - 1) * length)
    ids_BS = make_prompt(dense, texts, b"").ids
    if texts.context is not None:
        return [row[: longest - _TOKENS] for row in ids_BS.tolist()]
    ids = ids_BS.flatten().tolist()
    if wrapper_of(dense.config) is not None:
        # Tokens that stand for pictures need a picture.
        special = [value for key, value in dense.config.items() if "token" in key]
        ids = [token for token in ids if token not in special]
    begins = range(0, len(ids) - length + 1, length)[:_ROWS]
    return [ids[begin : begin + length] for begin in begins]


def compare(
    found: Output, expected: Output, tolerance: float = ROUNDING, *, on_average: bool = False
) -> tuple[str, dict[str, float]]:
    """Return how an output differs from the dense model's, empty if it does not, and metrics.

    Each log-probability may differ by `tolerance`, or those of a row `on_average`. Texts may part
    where the dense model prefers its token by less than the tolerance, and in low precision by less
    than four times that.
    """
    import numpy as np

    low_precision = tolerance >= LOW_PRECISION
    hesitation = 4 * tolerance if low_precision else tolerance
    measure, words = (np.mean, " on average") if on_average else (np.max, "")
    differences: list[str] = []
    pairs = zip(found["logprobs"] or (), expected["logprobs"] or (), strict=False)
    rows = [np.abs(np.subtract(*pair)) for pair in pairs]
    for index, row in enumerate(rows):
        if not (off := measure(row)) <= tolerance:
            differences.append(f"log-probabilities of row {index} differ by {off:.2g}{words}")
    texts = [*zip(found["texts"], expected["texts"], strict=False)]
    same = 0
    for index, (mine, wanted) in enumerate(texts):
        places = enumerate(zip_longest(mine, wanted))
        place = next((place for place, (a, b) in places if a != b), len(wanted))
        same += place
        hesitates = len(mine) == len(wanted) and place < len(wanted)
        hesitates = hesitates and expected["margins"][index][place] <= hesitation
        if mine != wanted and not hesitates:
            differences.append(f"the text after row {index} differs from token {place} on")
    total = sum(len(wanted) for _, wanted in texts)
    if same < min(_ENOUGH_TOKENS, total) and not low_precision:
        differences.append(f"only {same} of {total} tokens of text are the same")
    if not rows and not texts:
        differences.append("there is nothing to compare")
    every = np.concatenate(rows or [np.array([np.nan])])
    return "".join(differences[:1]), {
        "logprob_diff_mean": float(every.mean()),
        "logprob_diff_max": float(every.max()),
        "same_text_tokens": same,
        "text_tokens": total,
    }
