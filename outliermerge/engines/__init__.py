"""Who computes a block.

`base` says what an engine can do, and is the file to read first; `cpu` and `native/`, `torch` and
`triton` are those that are there. They import methods and what is below.
"""
