"""Groups that every Hydra application of the environment sees, see `hydra_plugins`. Hydra wants a package here; there
is no code in it."""
