"""Searches over Hydra jobs: `hydra/sweeper=lq`."""
