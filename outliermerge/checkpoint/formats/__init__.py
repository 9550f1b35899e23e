"""Which files of a folder are weights, and what their headers say.

Read `folder` first.
"""
