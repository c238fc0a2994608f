"""Records of one forward pass: modules and functional calls, shapes, MACs, and who feeds whom."""
