"""Models and data of the demo, the examples and the benchmarks."""
