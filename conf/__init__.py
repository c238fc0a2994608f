"""Hydra configs, installed as `lq_plugin.conf`. Hydra wants a package here; there is no code in it."""
