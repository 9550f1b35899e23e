"""PEFT adapters: their files, and the tensors of a base model as adapters change them.

Read `adapter` first.
"""
