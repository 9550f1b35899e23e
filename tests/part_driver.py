"""A process that writes a part of an output, knowing only a pickled plan and a folder.

Arguments: PLAN OUTPUT PART NUM_PARTS NUMBER WHEN. It stops itself (SIGSTOP) before or after the
journal line of the NUMBER-th tensor that it writes, as held_run.py does; at none if that is 0.
"""

import itertools
import os
import pickle
import signal
import sys
import threading
from pathlib import Path

from outliermerge.output.journal import Journal
from outliermerge.output.options import RunOptions
from outliermerge.output.parts import run_part


def main(plan, output, part, num_parts, number, when):
    add, lines, lock = Journal.add, itertools.count(1), threading.Lock()

    def stop():
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def held(journal, entry):
        with lock:
            here = "tensor" in entry and next(lines) == int(number)
            if here and when == "before":
                stop()
            add(journal, entry)
            if here and when == "after":
                stop()

    Journal.add = held
    options = RunOptions(memory="64MiB", threads=2, kernels="TORCH" not in os.environ)
    planned = pickle.loads(Path(plan).read_bytes())
    print(run_part(planned, Path(output), int(part), int(num_parts), options))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
