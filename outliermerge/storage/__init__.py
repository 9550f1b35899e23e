"""Files and byte ranges as the machine offers them, of whatever content.

It imports only errors; read `files` first.
"""
