"""What is known of model types: dense families, MoE targets, wrappers, engines and trainers.

Rows of data: `dense_rows` and `wrappers` (sources), `moe_rows` (targets). `lookup` finds rows and
picks a target, `moe_config` writes its config.
"""
