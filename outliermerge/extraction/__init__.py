"""Adapters made of models: what two models differ by, or a merge of adapters, as a LoRA.

Read `extract` first.
"""
