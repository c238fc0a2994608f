"""Files for MLX: safetensors with its packed weights, and the `config.json` that mlx-lm reads next to them.

`words` is how a weight lies in a file; `write` and `read` are the two ways.
"""
