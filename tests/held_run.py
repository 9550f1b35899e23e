"""outliermerge, stopped by itself (SIGSTOP) at a tensor's line in the journal.

Arguments: the number of the line, "before" or "after" it is written, or "interrupt", which is after
and waits for SIGINT when it goes on; and those of outliermerge. What is killed or interrupted there
is so at a known moment, however busy the machine is.
"""

import itertools
import signal
import sys
import threading

from outliermerge import cli
from outliermerge.output.journal import Journal

number, when = int(sys.argv[1]), sys.argv[2]
add, lines, told = Journal.add, itertools.count(1), threading.Event()
lock = threading.Lock()


def interrupted(signal_number, frame):
    told.set()
    signal.default_int_handler(signal_number, frame)


def hold():
    # To this thread: sent to the process, another may take it, and this one goes on meanwhile.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    if when == "interrupt":
        told.wait()  # and go no further before


def held(journal, entry):
    with lock:  # no other thread's line gets in
        here = "tensor" in entry and next(lines) == number
        if here and when == "before":
            hold()
        add(journal, entry)
        if here and when != "before":
            hold()


Journal.add = held
signal.signal(signal.SIGINT, interrupted)
sys.exit(cli.main(sys.argv[3:]))
