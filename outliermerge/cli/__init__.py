"""The command line: each command parses, calls the library and prints.

It may import every room; `main` is the file to read first.
"""
