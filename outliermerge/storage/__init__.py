"""Access to files and byte ranges, whatever their content is.

Of the package it imports only `errors`; read `files` first.
"""
