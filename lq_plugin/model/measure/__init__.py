"""Measurements of a prepared model: its cost, and how well each tensor survives."""
