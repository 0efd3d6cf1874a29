"""Everything that transformers is asked: configs, empty models, loaded models, tokenizers.

Its warnings, progress bars and log lines stay off the user's screen, and whatever it raises on a
damaged checkpoint becomes a `TransformersError` with what it said. Nothing here goes online.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from upcycle_cli.checkpoint import GENERATION_NAME, Checkpoint
from upcycle_cli.errors import UpcycleError, lack_in_words

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
