"""Scores of plans: metric, costs, latency, at one or several levels of fidelity."""
