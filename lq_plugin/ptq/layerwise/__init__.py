"""Inputs of one part of a model after the other, kept in memory and on disk."""
