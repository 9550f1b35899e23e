"""Engines: they compute the blocks of a merge.

Read `base` first: it is the protocol of an engine. The engines are `cpu` (with the C kernels in
`native/`), `torch` and `triton`. They import methods and the layers below methods.
"""
