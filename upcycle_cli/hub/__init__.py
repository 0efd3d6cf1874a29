"""The Hugging Face Hub, through huggingface_hub: where sources come from and results go."""
