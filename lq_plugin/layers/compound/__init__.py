"""Modules with several weights: recurrent layers and attention."""
