"""Analysis of weights: distributions, comparisons, spectra, simulations, reports."""
