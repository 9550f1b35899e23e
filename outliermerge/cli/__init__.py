"""The command line: each command has a file that parses arguments, calls the library and prints.

It may import every room. Read `main` first; `schema` is the shortest command.
"""
