"""Stands in for Slurm's sbatch: carries a script out by plain processes, before it returns.

It knows what examples/slurm uses: --parsable, --array=A-B or A,B, --dependency=afterany:JOB, a
script with `#SBATCH --cpus-per-task`, and its arguments. The tasks of an array run at the same
time. Output goes to slurm-JOB.out and slurm-JOB_TASK.out in the present folder. The number of the
job is printed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path


def main(arguments):
    """Run a script as often as its array says."""
    numbers, is_array = ["0"], False
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        if name == "--array":
            is_array = True
            first, dash, last = value.partition("-")
            numbers = value.split(",")
            if dash:
                numbers = [str(number) for number in range(int(first), int(last) + 1)]
        elif name == "--dependency":
            kind, _, job = value.partition(":")
            assert kind == "afterany"
            assert Path(f"job-{job}").exists(), "the job that is waited for was never submitted"
        else:
            assert name == "--parsable", name
    script = Path(arguments[0])
    job = 1 + len(list(Path.cwd().glob("job-*")))
    cpus = re.search(r"^#SBATCH --cpus-per-task=(\d+)$", script.read_text(), re.M)[1]
    running = []
    for number in numbers:
        own = {"SLURM_JOB_ID": str(job), "SLURM_CPUS_PER_TASK": cpus}
        if is_array:
            own |= {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_COUNT": str(len(numbers))}
        log = Path(f"slurm-{job}_{number}.out" if is_array else f"slurm-{job}.out")
        with log.open("wb") as file:
            command = ["bash", *arguments]
            environment = os.environ | own
            running.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    Path(f"job-{job}").write_text(" ".join(str(process.wait()) for process in running))
    print(job)


if __name__ == "__main__":
    main(sys.argv[1:])
