"""Folders of compressed-tensors, which transformers and vLLM load: what they hold, and how it is written and opened."""
