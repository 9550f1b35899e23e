"""outliermerge, stopped by itself (SIGSTOP) at a tensor's line in the journal.

Arguments: the number of the line, "before" or "after" it is written, or "interrupt", which is after
and waits for SIGINT when it goes on; and those of outliermerge. What is killed or interrupted there
is so at a known moment, however busy the machine is.
"""

import itertools
import os
import signal
import sys
import threading

from outliermerge import cli
from outliermerge.output.journal import Journal

number, when = int(sys.argv[1]), sys.argv[2]
add, lines, told = Journal.add, itertools.count(1), threading.Event()


def interrupted(signal_number, frame):
    told.set()
    signal.default_int_handler(signal_number, frame)


def hold():
    os.kill(os.getpid(), signal.SIGSTOP)
    if when == "interrupt":
        told.wait()  # and go no further before


def held(journal, entry):
    if "tensor" not in entry or next(lines) != number:
        return add(journal, entry)
    if when == "before":
        hold()
    add(journal, entry)
    if when != "before":
        hold()


Journal.add = held
signal.signal(signal.SIGINT, interrupted)
sys.exit(cli.main(sys.argv[3:]))
