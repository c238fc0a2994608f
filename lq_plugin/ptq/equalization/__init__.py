"""Cross-layer equalization (Nagel et al., ICCV 2019, section 4.1)."""
