"""Carries out a plan, tensor by tensor.

Read `pipeline` first; `threads` gives it the jobs. This room imports engines, planning and the
layers below them.
"""
