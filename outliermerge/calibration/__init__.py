"""Runs models over data: statistics for merge methods, and merges that are fitted to data."""
