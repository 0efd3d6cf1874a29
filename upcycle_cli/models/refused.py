"""The dense model types that cannot be upcycled, and why."""

from __future__ import annotations

from collections.abc import Mapping

_IN_LAYER = "its layers hold the MLP's matrices themselves, and nothing that experts can replace"
_ADDS_RESIDUAL = (
    "its MLP adds the residual stream itself, so that experts would add it several times"
)
_CONVERTED = (
    "transformers makes other tensors of those in its files, which it does for no shipped code"
)
REFUSED: Mapping[str, str] = {
    "bitnet": "its MLP normalises over all of its neurons, which no part of it can",
    **dict.fromkeys(("bloom", "mpt"), _ADDS_RESIDUAL),
    **dict.fromkeys(("biogpt", "opt", "trocr", "xglm"), _IN_LAYER),
    "dory": "its MLP scales its neurons by tensors of their own",
    **dict.fromkeys(("exaone", "olmo_hybrid"), _CONVERTED),
    "falcon_h1": "its base model computes a buffer that shipped code is not given",
    **dict.fromkeys(
        ("gemma3n_text", "gemma4_unified_text"),
        "its layers have embeddings of their own, which were not tried",
    ),
    "openai-gpt": "its config does not say how wide its MLP is",
    **dict.fromkeys(("xlm", "xlnet"), "it sees the tokens on both sides of one that it predicts"),
    "hrm_text": "it runs its layers several times over",
    **dict.fromkeys(
        ("cohere_compass_text", "cpmant", "ctrl", "recurrent_gemma", "zamba", "zamba2"),
        "its layers are of a kind that was not tried",
    ),
    **dict.fromkeys(
        ("falcon_mamba", "mamba", "mamba2", "reformer", "rwkv", "xlstm"),
        "its layers have no MLP of the usual kind",
    ),
}
"""Dense decoders that cannot be taken, and why: the end of "X cannot be upcycled: …"."""
