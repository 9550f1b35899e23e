"""Scores of models: lmms-eval as a subprocess, its results as tables and charts."""
