"""The merge methods: `contract` says what one is, `table` lists them.

They import nothing of models, files or plans but dtypes.
"""
