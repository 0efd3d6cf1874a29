"""Loading an MoE by transformers, once for all checks, if it can be loaded at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from upcycle_cli.memory import memory_objection
from upcycle_cli.verification.facts import Facts
from upcycle_cli.verification.headers import header_failures
from upcycle_cli.verification.models import MOST_TOKENS, TransformersError, load_model


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
            names, label = sorted(map(str, items)), key.replace("_", " ")
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            if names:
                found.append(f"transformers reports {label}: {', '.join(names[:3])}{more}")
        return tuple(found)


@dataclass
class MoeLoader:
    """Loads the MoE once for all checks, in float32 when its outputs will be computed."""

    facts: Facts
    for_outputs: bool

    @cached_property
    def header_failures(self) -> tuple[str, ...]:
        """What is wrong with the names and shapes of the MoE's tensors."""
        return tuple(header_failures(self.facts.moe, self.facts.target))

    @cached_property
    def outputs_objection(self) -> str | None:
        """Why the outputs cannot be computed in the memory there is, or None.

        One model is in memory at a time, in float32, but the logits of both, and of the dense one
        with rounded weights.
        """
        largest = max(self.facts.dense.num_parameters, self.facts.moe.num_parameters)
        vocab_size = self.facts.dense.tensors[self.facts.family.embedding].shape[0]
        return memory_objection(4 * (largest + 3 * MOST_TOKENS * vocab_size))

    @cached_property
    def loading(self) -> Loading:
        """The outcome; the model is loaded when this is first asked for."""
        import torch

        for_outputs = self.for_outputs and self.outputs_objection is None
        if not for_outputs:
            objection = memory_objection(self.facts.moe.nbytes)
            if objection is not None:
                return Loading(not_tried=objection)
        if self.header_failures:
            return Loading(refusal="its tensors are not those that config.json implies")
        dtype = torch.float32 if for_outputs else "auto"
        # The grouped matrix product takes rows of a multiple of 16 bytes, in float16 as well.
        how = {"experts_implementation": "eager"} if self.facts.expert_size % 8 else {}
        try:
            model, info = load_model(self.facts.moe.path, dtype, **how)
        except TransformersError as error:
            return Loading(refusal=str(error))
        return Loading(model=model if for_outputs else None, info=info)

    def take(self) -> Loading:
        """Return the outcome and forget it, so that the caller can free the model."""
        loading = self.loading
        del self.loading
        return loading
