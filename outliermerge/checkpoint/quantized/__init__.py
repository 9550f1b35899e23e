"""Tensors that are stored as codes and scales.

Read `opened` first.
"""
