"""Everything that transformers is asked: configs, empty models, loaded models, tokenizers.

Its warnings, progress bars and log lines stay off the user's screen, and whatever it raises on a
damaged checkpoint becomes a `TransformersError` with what it said. Nothing here goes online.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint import Checkpoint
from upcycle_cli.verification.facts import EMBEDDING, Facts

MOST_TOKENS = 1024
"""The longest sequence that both models are run on."""

_MEMORY_MARGIN = 1.1
_MEMINFO = Path("/proc/meminfo")


class TransformersError(Exception):
    """Transformers refused, in its own words."""


@contextmanager
def transformers_says() -> Iterator[None]:
    """Keep transformers quiet, and turn what it raises into TransformersError."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise
    except Exception as error:
        # There is no list of what a damaged checkpoint can make transformers raise: OSError and
        # ValueError, but KeyError, ZeroDivisionError and huggingface_hub's own as well. All of it
        # is a finding about the checkpoint.
        words = " ".join(str(error).split()) or type(error).__name__
        raise TransformersError(f"{type(error).__name__}: {words[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_config(path: Path) -> Any:  # noqa: ANN401 - transformers has no types to name
    """Return transformers' config of a checkpoint; raises TransformersError."""
    with transformers_says():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(path, local_files_only=True)


def empty_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model that config.json describes, with their shapes.

    The model is made on the meta device, so it costs no memory; raises TransformersError.
    """
    import torch

    config = load_config(path)
    with transformers_says():
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load_model(path: Path, dtype: Any) -> tuple[Any, Mapping[str, Any]]:  # noqa: ANN401
    """Return the model in evaluation mode, and what transformers reports about loading it.

    Raises TransformersError.
    """
    with transformers_says():
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, local_files_only=True
        )
        return model.eval(), info


def load_tokenizer(path: Path) -> Any:  # noqa: ANN401
    """Return the tokenizer of a directory; raises TransformersError."""
    with transformers_says():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True)


def tokenizer_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the files that hold a checkpoint's tokenizer, if any."""
    others = ("generation_config.json", "LICEN", "NOTICE", "USE_POLICY")
    names = (file.name for file in checkpoint.companions)
    return tuple(name for name in names if not name.startswith(others))


def available_bytes() -> int | None:
    """Return the memory that can still be taken, or None where the system does not say."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


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

        One model is in memory at a time, in float32, but the logits of both.
        """
        largest = max(self._facts.dense.num_parameters, self._facts.moe.num_parameters)
        vocab_size = self._facts.dense.tensors[EMBEDDING].shape[0]
        return memory_objection(4 * (largest + 2 * MOST_TOKENS * vocab_size))

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
            model, info = load_model(self._facts.moe.path, dtype)
        except TransformersError as error:
            return Loading(refusal=str(error))
        return Loading(model=model if for_outputs else None, info=info)

    def take(self) -> Loading:
        """Return the outcome and forget it, so that the caller can free the model."""
        loading = self.loading
        del self.loading
        return loading
