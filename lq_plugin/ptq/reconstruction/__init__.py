"""Learned rounding: AdaRound (Nagel et al., ICML 2020) and BRECQ (Li et al., ICLR 2021)."""
