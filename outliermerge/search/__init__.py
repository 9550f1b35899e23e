"""Merges with several settings at once.

It imports the library (`api`) and the layers below it; read `sweeps` first.
"""
