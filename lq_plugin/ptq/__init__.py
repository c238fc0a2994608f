"""Post-training quantization: one folder for each algorithm, and the phases that run them."""
