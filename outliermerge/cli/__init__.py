"""The command line: each command has a file, which parses, calls the library and prints.

It may import every room; `main` is the file to read first, `schema` the shortest command.
"""
