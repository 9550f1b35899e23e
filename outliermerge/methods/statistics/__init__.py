"""The statistics of a whole tensor that methods may need, measured block by block.

Read `base` first.
"""
