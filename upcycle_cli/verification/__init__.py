"""`verify`: rebuild the plan of a conversion, compare the MoE with it, and run both models."""
