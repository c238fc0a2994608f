"""GGUF files: language models of transformers for llama.cpp, in its own types.

`types` and `blocks` are how a weight lies in a file, `architecture` what llama.cpp calls a tensor and computes with it,
`vocabulary` the tokens; `write` and `read` are the two ways.
"""
