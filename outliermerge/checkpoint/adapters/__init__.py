"""Adapters of peft: their files, and the tensors that they make of a base model.

Read `adapter` first.
"""
