"""Scores of models: runs lmms-eval as a subprocess, and shows results as tables and charts."""
