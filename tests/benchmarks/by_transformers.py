"""What one would write by hand: load the dense model, build the MoE, copy, save.

    python by_transformers.py DENSE OUTPUT

E8G1T2. It is as fast as this way allows: bfloat16 throughout, and no time is spent on random
weights that are overwritten.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.initialization import no_init_weights

NUM_EXPERTS = 8


@torch.no_grad()
def main(dense_path: str, output: str) -> None:
    """Convert the model."""
    dense = AutoModelForCausalLM.from_pretrained(dense_path, dtype=torch.bfloat16)
    settings = dense.config.to_dict()
    for own in ("model_type", "attention_bias", "mlp_bias", "pretraining_tp"):
        settings.pop(own, None)
    config = MixtralConfig(**settings)  # 8 experts, 2 active, by default
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        moe = MixtralForCausalLM(config)
    missing, _ = moe.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in name for name in missing), missing
    for old, new in zip(dense.model.layers, moe.model.layers, strict=True):
        gate_up = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
        new.mlp.gate.weight.normal_(std=0.02)
        new.mlp.experts.gate_up_proj.copy_(gate_up.expand(NUM_EXPERTS, -1, -1))
        new.mlp.experts.down_proj.copy_(old.mlp.down_proj.weight.expand(NUM_EXPERTS, -1, -1))
    moe.save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
