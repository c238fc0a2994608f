"""Where the callbacks meet Lightning: data, steps, optimizers, strategies, other callbacks."""
