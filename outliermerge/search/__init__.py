"""Merges with several settings at once.

It imports the library (`api`) and what is below; read `sweeps` first.
"""
