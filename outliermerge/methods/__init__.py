"""The merge methods: `contract` defines what a method is, `table` lists all methods.

They know nothing of models, files or plans; of `checkpoint` they import only dtypes.
"""
