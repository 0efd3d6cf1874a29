"""The dense model types that cannot be upcycled, with reasons."""

from __future__ import annotations

from collections.abc import Mapping

_IN_LAYER = "its layers hold the MLP's matrices directly, not in a module that experts can replace"
_ADDS_RESIDUAL = "its MLP adds the residual stream, which experts would add several times"
_CONVERTED = "transformers converts its tensors on loading, but not for shipped code"
REFUSED: Mapping[str, str] = {
    "bitnet": "its MLP normalises over all neurons, which no shard can",
    **dict.fromkeys(("bloom", "mpt"), _ADDS_RESIDUAL),
    **dict.fromkeys(("biogpt", "opt", "trocr", "xglm"), _IN_LAYER),
    "dory": "its MLP scales neurons by separate tensors",
    **dict.fromkeys(("exaone", "olmo_hybrid"), _CONVERTED),
    "falcon_h1": "its base model computes a buffer that shipped code does not receive",
    **dict.fromkeys(
        ("gemma3n_text", "gemma4_unified_text"), "its per-layer embeddings are untested"
    ),
    "openai-gpt": "its config does not state the width of its MLP",
    **dict.fromkeys(("xlm", "xlnet"), "it sees tokens on both sides of the one it predicts"),
    "hrm_text": "it runs its layers repeatedly",
    **dict.fromkeys(
        ("cohere_compass_text", "cpmant", "ctrl", "recurrent_gemma", "zamba", "zamba2"),
        "this layer type is untested",
    ),
    **dict.fromkeys(
        ("falcon_mamba", "mamba", "mamba2", "reformer", "rwkv", "xlstm"),
        "its layers have no MLP of a supported kind",
    ),
}
"""The rest of the sentence "X cannot be upcycled: …" by model type."""
