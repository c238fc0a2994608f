"""Scores of plans: metric, costs, latency, at one or several rungs of fidelity."""
