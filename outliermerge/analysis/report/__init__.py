"""The report: one page about weights, and figures for papers."""
