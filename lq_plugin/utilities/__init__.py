"""Helpers that know nothing of quantization: files, passwords, configs, the two Lightning packages."""
