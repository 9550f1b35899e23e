"""outliermerge, stopped by itself (SIGSTOP) at a tensor's line in the journal.

Arguments: the number of the line; "before" or "after" it is written, or "interrupt", which is
after, and then waits until an interrupt has stopped the run; and those of outliermerge. What is
killed or interrupted there is so at a known moment, however busy the machine is.
"""

import itertools
import signal
import sys
import threading

from outliermerge.cli.main import main as cli
from outliermerge.execution.rounds import _Queue
from outliermerge.output.journal import Journal


def main(number, when, arguments):
    """Run the command line, and stop this process at a line of the journal."""
    add, stop, lines = Journal.add, _Queue.stop, itertools.count(1)
    is_stopped, lock = threading.Event(), threading.Lock()

    def stopped(queue):
        stop(queue)
        is_stopped.set()

    def hold():
        # To this thread: sent to the process, another may take it while this one goes on.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        if when == "interrupt":
            is_stopped.wait()  # the run does not go on before

    def held(journal, entry):
        with lock:  # no other thread's line gets in
            here = "tensor" in entry and next(lines) == number
            if here and when == "before":
                hold()
            add(journal, entry)
            if here and when != "before":
                hold()

    Journal.add, _Queue.stop = held, stopped
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    return cli(arguments)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
