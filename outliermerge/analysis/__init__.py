"""Looking at weights: distributions, comparisons, spectra, simulations, reports."""
