"""A plan carried out tensor by tensor.

`threads` hands jobs to `pipeline`, which is the file to read first. It imports engines, plans and
what is below.
"""
