"""Common parts of studies and sweeps: databases, storages, other workers, interrupts, pruners."""
