"""Runs several command lines at the same time, in forks of one process; for test_races.

A line of JSON on the standard input is a list of commands with the seconds that each waits; the
answer is a list of exit codes and messages.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

from injection_driver import import_all

from outliermerge.cli import main as cli


def main() -> None:
    """Answer the lines until there are no more."""
    import_all()
    for line in sys.stdin:
        start_out, start_in = os.pipe()
        children, messages = [], []
        for arguments, delay in json.loads(line):
            file = tempfile.TemporaryFile("w+")
            messages.append(file)
            child = os.fork()
            if child == 0:
                os.close(start_in)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(file.fileno(), 2)
                os.read(start_out, 1)  # until all of them are there
                time.sleep(delay)
                code = 99
                try:
                    code = cli.main(arguments)
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        os.close(start_out)
        os.close(start_in)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answers = []
        for code, file in zip(codes, messages, strict=True):
            file.seek(0)
            answers.append([code, file.read()])
            file.close()
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
