"""Merges in parts by submitit: python examples/submitit_merge.py SPEC OUT PARTS [slurm|local].

`slurm` submits a job array, `local` starts processes on this machine.
"""

import sys

import submitit

import outliermerge


def write_part(spec: str, output: str, part: int, num_parts: int) -> int:
    return outliermerge.run_part(outliermerge.plan(spec), output, part, num_parts)


def finish(spec: str, output: str) -> str:
    return str(outliermerge.join(outliermerge.plan(spec), output).output)


def main(spec: str, output: str, num_parts: int, cluster: str = "slurm") -> None:
    executor = submitit.AutoExecutor(folder=f"{output}.logs", cluster=cluster)
    executor.update_parameters(timeout_min=240, cpus_per_task=2, mem_gb=2)
    numbers = range(1, num_parts + 1)
    same = [spec] * num_parts, [output] * num_parts
    jobs = executor.map_array(write_part, *same, numbers, [num_parts] * num_parts)
    print("tensors written:", [job.result() for job in jobs])
    print("joined:", executor.submit(finish, spec, output).result())


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), *sys.argv[4:])
