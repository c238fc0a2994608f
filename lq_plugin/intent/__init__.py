"""What is wanted of a model, as plain values: specs, plans and schedules. Nothing here imports torch."""
