"""What one forward pass did: modules and functional calls, shapes, MACs, who feeds whom."""
