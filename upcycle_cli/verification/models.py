"""Everything that transformers is asked: configs, empty models, loaded models, tokenizers.

Its warnings, progress bars and log lines stay off the user's screen, and whatever it raises on a
damaged checkpoint becomes a `TransformersError` with what it said. Nothing here goes online.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from upcycle_cli.checkpoint import GENERATION_NAME, Checkpoint
from upcycle_cli.errors import UpcycleError, lack_in_words
from upcycle_cli.verification.facts import EMBEDDING, Facts

MOST_TOKENS = 1024
"""The longest sequence that both models are run on."""

_OFFLINE: Mapping[str, Any] = {
    "local_files_only": True,
    "trust_remote_code": False,  # else it may ask on the terminal
}
_SYSTEM_REFUSALS = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE)
_MEMORY_MARGIN = 1.1
_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


class TransformersError(Exception):
    """Transformers refused, in its own words."""


def _transformers() -> tuple[Any, Any, Any]:
    """Return AutoConfig, AutoModelForCausalLM and AutoTokenizer.

    Raises UpcycleError when they cannot be imported, which says nothing about a checkpoint.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except Exception as error:
        # A broken installation raises ImportError mostly, but AttributeError or OSError as well,
        # from a library that does not fit.
        words = " ".join(str(error).split()) or type(error).__name__
        raise UpcycleError(
            f"transformers cannot be imported: {words[:300]}",
            "Install it again: pip install --force-reinstall transformers",
        ) from error
    return AutoConfig, AutoModelForCausalLM, AutoTokenizer


@contextmanager
def transformers_says() -> Iterator[None]:
    """Keep transformers quiet and offline, and turn what it raises into TransformersError."""
    _transformers()
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline = constants.HF_HUB_OFFLINE
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    # A checkpoint can name repos in more places than there are options to forbid it.
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, UpcycleError):
        raise
    except BaseException as error:
        lack = lack_in_words(error)
        if lack is not None:
            raise lack from error
        # The tokenizers library panics where it was not made for its input, outside of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # There is no list of what a damaged checkpoint can make transformers raise: OSError and
        # ValueError, but KeyError, ZeroDivisionError and huggingface_hub's own as well. All of it
        # is a finding about the checkpoint, but for what the system refuses.
        if isinstance(error, OSError) and error.errno in _SYSTEM_REFUSALS:
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise TransformersError(f"{type(error).__name__}: {words[:300]}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_config(path: Path) -> Any:  # noqa: ANN401 - transformers has no types to name
    """Return transformers' config of a checkpoint; raises TransformersError."""
    auto_config, _, _ = _transformers()
    with transformers_says():
        return auto_config.from_pretrained(path, **_OFFLINE)


def empty_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model that config.json describes, with their shapes.

    The model is made on the meta device, so it costs no memory; raises TransformersError.
    """
    import torch

    _, auto_model, _ = _transformers()
    config = load_config(path)
    with transformers_says():
        with torch.device("meta"):
            model = auto_model.from_config(config)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load_model(path: Path, dtype: Any, **how: Any) -> tuple[Any, Mapping[str, Any]]:  # noqa: ANN401
    """Return the model in evaluation mode, and what transformers reports about loading it.

    `how` is passed on to transformers. Raises TransformersError.
    """
    _, auto_model, _ = _transformers()
    with transformers_says():
        model, info = auto_model.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **_OFFLINE, **how
        )
        return model.eval(), info


def load_tokenizer(path: Path) -> Any:  # noqa: ANN401
    """Return the tokenizer of a directory; raises TransformersError."""
    _, _, auto_tokenizer = _transformers()
    with transformers_says():
        return auto_tokenizer.from_pretrained(path, **_OFFLINE)


def tokenizer_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the files that hold a checkpoint's tokenizer, if any."""
    others = (GENERATION_NAME, "LICEN", "NOTICE", "USE_POLICY")
    names = (file.name for file in checkpoint.companions)
    return tuple(name for name in names if not name.startswith(others))


def available_bytes() -> int | None:
    """Return the memory that can still be taken, or None where the system does not say.

    The machine may have more than the process's control groups allow.
    """
    known = [*_machine_bytes(), *_cgroup_bytes()]
    return max(0, min(known)) if known else None


def _machine_bytes() -> Iterator[int]:
    for key, value in _numbers(_MEMINFO):
        if key == "MemAvailable":
            yield value * 1024


def _cgroup_bytes() -> Iterator[int]:
    """Yield what each control group above the process leaves, of either version."""
    for line in _lines(_OWN_CGROUPS):
        # hierarchy:controllers:path, the controllers being empty in version 2
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, limit_name, usage_name = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, where only the root is to be seen.
        own = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
        for folder in (own, *own.parents):
            limit = _number(root / folder / limit_name)
            usage = _number(root / folder / usage_name)
            if limit is not None and usage is not None:
                cache = dict(_numbers(root / folder / "memory.stat"))
                # Version 1 counts the groups below under another name.
                reclaimable = cache.get("total_inactive_file", cache.get("inactive_file", 0))
                yield limit - usage + min(reclaimable, usage)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _numbers(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the names and numbers of a file of lines such as `name: 1 kB`."""
    for line in _lines(path):
        words = line.split()
        if len(words) >= 2 and words[1].isdecimal():
            yield words[0].removesuffix(":"), int(words[1])


def _number(path: Path) -> int | None:
    """Return a file's number; None when it is not there, or says `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def memory_objection(needed: float) -> str | None:
    """Say how memory for `needed` bytes, and a margin, is lacking; None when it is there."""
    available = available_bytes()
    needed *= _MEMORY_MARGIN
    if available is None or needed <= available:
        return None
    return f"it needs {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available"


@dataclass(frozen=True)
class Loading:
    """The outcome of loading the MoE: a model and a report, or why there is none."""

    model: Any = None
    info: Mapping[str, Any] | None = None
    refusal: str | None = None
    """What transformers said when it could not load the model."""
    not_tried: str | None = None
    """Why loading was not tried."""

    @property
    def complaints(self) -> tuple[str, ...]:
        """What transformers found wrong with the weights, one sentence each."""
        if self.refusal is not None:
            return (f"transformers could not load the MoE: {self.refusal}",)
        if self.info is None:
            return ()
        found = []
        for key, items in sorted(self.info.items()):
            names = sorted(str(item) for item in items)
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                label = key.replace("_", " ")
                found.append(f"transformers reports {label}: {', '.join(names[:3])}{more}")
        return tuple(found)


class MoeLoader:
    """Loads the MoE once for all checks, in float32 when its outputs will be computed."""

    def __init__(self, facts: Facts, *, for_outputs: bool) -> None:
        self._facts = facts
        self._for_outputs = for_outputs

    @cached_property
    def outputs_objection(self) -> str | None:
        """Why the outputs cannot be computed in the memory there is, or None.

        One model is in memory at a time, in float32, but the logits of both, and of the dense one
        with rounded weights.
        """
        largest = max(self._facts.dense.num_parameters, self._facts.moe.num_parameters)
        vocab_size = self._facts.dense.tensors[EMBEDDING].shape[0]
        return memory_objection(4 * (largest + 3 * MOST_TOKENS * vocab_size))

    @property
    def _how(self) -> dict[str, str]:
        # The grouped matrix product takes rows of a multiple of 16 bytes, in float16 as well.
        return {"experts_implementation": "eager"} if self._facts.expert_size % 8 else {}

    @cached_property
    def loading(self) -> Loading:
        """The outcome; the model is loaded when this is first asked for."""
        import torch

        for_outputs = self._for_outputs and self.outputs_objection is None
        if not for_outputs:
            objection = memory_objection(self._facts.moe.nbytes)
            if objection is not None:
                return Loading(not_tried=objection)
        dtype = torch.float32 if for_outputs else "auto"
        try:
            model, info = load_model(self._facts.moe.path, dtype, **self._how)
        except TransformersError as error:
            return Loading(refusal=str(error))
        return Loading(model=model if for_outputs else None, info=info)

    def take(self) -> Loading:
        """Return the outcome and forget it, so that the caller can free the model."""
        loading = self.loading
        del self.loading
        return loading
