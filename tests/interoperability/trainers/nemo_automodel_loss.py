"""NeMo AutoModel with MODEL.

It wants a GPU from the first line on, so that some places are told of the CPU: the device that is
current, those that weights are made on and loaded to, and that of rotary embeddings.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

torch.cuda.current_device = lambda: 0

from answer import Rows, changed, config, next_token_loss, no_picture, serve, tensors
from nemo_automodel import NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText
from nemo_automodel._transformers import auto_model
from nemo_automodel.components.models.glm4_moe.model import Glm4MoeForCausalLM
from nemo_automodel.components.models.gpt_oss import rope_utils
from transformers import PreTrainedModel

CPU = torch.device("cpu")
RotaryEmbedding, infrastructure = rope_utils.RotaryEmbedding, auto_model.apply_model_infrastructure
build_rotary, initialize = RotaryEmbedding.__init__, Glm4MoeForCausalLM.initialize_weights


def rotary_on_cpu(self: Any, *arguments: Any, **settings: Any) -> None:
    """Make rotary embeddings for the CPU."""
    build_rotary(self, *arguments, **{**settings, "device": CPU})


def initialize_on_cpu(self: Any, **settings: Any) -> None:
    """Make weights on the CPU, before those of the checkpoint are read."""
    initialize(self, **{**settings, "buffer_device": CPU})


def load_on_cpu(**settings: Any) -> Any:
    """Load weights to the CPU."""
    return infrastructure(**{**settings, "device": CPU})


RotaryEmbedding.__init__ = rotary_on_cpu
Glm4MoeForCausalLM.initialize_weights = initialize_on_cpu
auto_model.apply_model_infrastructure = load_on_cpu


def measure(folder: Path, rows: Rows) -> tuple[float, list[str], dict[str, Any]]:
    """Say the loss, what its adapter gives back, and whether and how it balances."""
    wraps = "text_config" in config(folder)
    auto = NeMoAutoModelForImageTextToText if wraps else NeMoAutoModelForCausalLM
    model: Any = auto.from_pretrained(
        str(folder), torch_dtype=torch.float32, use_liger_kernel=False, trust_remote_code=True
    )
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.device = CPU
    with torch.no_grad():
        kinds = no_picture(model, len(rows[0]))
        known = {key: torch.tensor([zeros] * len(rows)) for key, zeros in kinds.items()}
        output = model.train()(torch.tensor(rows), **known)
    loss = next_token_loss(getattr(output, "logits", output), rows)
    adapter = getattr(model, "state_dict_adapter", None)
    if adapter is not None:
        state = adapter.to_hf(dict(model.state_dict()))
    else:
        with tempfile.TemporaryDirectory(prefix="upcycle-trainer-") as name:
            PreTrainedModel.save_pretrained(model, name)
            state = tensors(Path(name))
    gates = [module for module in model.modules() if hasattr(module, "bias_update_factor")]
    measured: dict[str, Any] = {"code": "transformers'" if adapter is None else "its own"}
    for gate in gates:
        measured["aux_loss_coeff"] = gate.aux_loss_coeff
        measured["step of the bias"] = gate.bias_update_factor
        # What its recipe looks for, to take that step.
        measured["takes it"] = hasattr(model, "update_moe_gate_bias")
    return loss, changed(folder, state), measured


if __name__ == "__main__":
    serve(measure)
