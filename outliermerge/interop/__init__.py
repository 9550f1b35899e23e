"""The methods inside other tools that merge: mergekit, sd-mecha, FusionBench.

Each file but `mergekit_yaml.py` imports its tool, and nothing else of the package imports them.
"""
