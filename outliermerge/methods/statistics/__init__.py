"""What a method may want to know of a whole tensor, measured block by block.

Read `base` first.
"""
