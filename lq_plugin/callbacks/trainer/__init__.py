"""The callbacks' side of Lightning: data, steps, optimizers, strategies, other callbacks."""
