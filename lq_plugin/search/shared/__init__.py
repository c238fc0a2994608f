"""What studies and sweeps share: databases, storages, other workers, interrupts, pruners."""
