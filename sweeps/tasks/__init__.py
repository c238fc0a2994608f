"""Models and data of the sweeps in this folder: one file each, to be replaced by yours."""
