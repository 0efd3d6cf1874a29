"""Megatron-Bridge with MODEL: its importer, Megatron Core's model, and its exporter.

Both want Transformer Engine and a GPU. Here, Megatron Core's own layers take the place of
Transformer Engine's, experts are separate matrices instead of one grouped product, and the modules
of LoRA, which import Transformer Engine, are empty.
"""

from __future__ import annotations

import sys
import tempfile
import types
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from answer import Rows, changed, config, serve
from torch import distributed


class Empty(types.ModuleType):
    """A module in which every name is a class."""

    def __getattr__(self, name: str) -> type:
        """Make it."""
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for part in ("lora", "lora_layers", "canonical_lora", "utils"):
    sys.modules[f"megatron.bridge.peft.{part}"] = Empty(part)
setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))  # noqa: B010

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    MegatronParamMapping,
)
from megatron.bridge.models.glm.glm45_bridge import GLM45Bridge
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils

setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)  # noqa: B010
CudaRNGStatesTracker.fork = lambda *_: nullcontext()
moe_utils.te_general_gemm = None
OFF = (
    *("moe_grouped_gemm", "moe_permute_fusion", "moe_shared_expert_overlap", "bf16"),
    *("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion"),
    *("masked_softmax_fusion", "gradient_accumulation_fusion", "persist_layer_norm"),
    "cross_entropy_loss_fusion",
)
SETTINGS = {
    **dict.fromkeys(OFF, False),
    **dict.fromkeys(("params_dtype", "autocast_dtype"), torch.float32),
    "moe_router_dtype": None,
    "moe_token_dispatcher_type": "allgather",
    "cross_entropy_fusion_impl": "native",
    "transformer_impl": "local",
}
grouped_only, EXPERT = GLM45Bridge.mapping_registry, "model.layers.*.mlp.experts.*"


def with_separate_experts(self: Any) -> Any:
    """Add the names of separate experts, which other importers have."""
    held = "decoder.layers.*.mlp.experts.local_experts.*.linear_fc"
    halves = {"gate": f"{EXPERT}.gate_proj.weight", "up": f"{EXPERT}.up_proj.weight"}
    return MegatronMappingRegistry(
        *grouped_only(self).mappings,
        GatedMLPMapping(megatron_param=f"{held}1.weight", **halves),
        AutoMapping(megatron_param=f"{held}2.weight", hf_param=f"{EXPERT}.down_proj.weight"),
    )


GLM45Bridge.mapping_registry = with_separate_experts
# The index that it would add to names of experts is there already.
MegatronParamMapping.gather_from_ep_ranks = lambda _self, weight, _module, name: {name: weight}


def measure(folder: Path, rows: Rows) -> tuple[float, list[str], dict[str, Any]]:
    """Say the loss, and what the exporter gives back."""
    meet = f"file://{tempfile.mkdtemp()}/store"
    distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    bridge = AutoBridge.from_hf_pretrained(folder, dtype=torch.float32)
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, value in SETTINGS.items():
        setattr(provider, name, value)
    if not config(folder)["norm_topk_prob"]:  # this one is said in trainers.json
        provider.moe_router_pre_softmax = True
    provider.transformer_layer_spec = partial(
        get_gpt_decoder_block_spec, use_transformer_engine=False, normalization="RMSNorm"
    )
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.load_hf_weights(model)
    ids = torch.tensor(rows)
    seen, wanted = ids[:, :-1], ids[:, 1:]
    count = seen.shape[1]
    hidden = torch.ones(1, 1, count, count, dtype=torch.bool).triu(1)
    with torch.no_grad():
        positions = torch.arange(count).expand_as(seen)
        losses = model[0].eval()(seen, positions, hidden, labels=wanted)
    state: dict[str, torch.Tensor] = {}
    with suppress(ValueError):  # it cannot export what it did not import
        state |= bridge.export_hf_weights(model, cpu=True, show_progress=False)
    return float(losses.mean()), changed(folder, state), {}


if __name__ == "__main__":
    serve(measure)
