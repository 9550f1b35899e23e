"""Merges on a Ray cluster whose machines read from an object store, each by a line of its own.

The machines are raylets of one processor, all on this machine. An S3 server on the loopback answers
each request 10 ms late. It answers each machine at a port of its own, where it sends no more bytes
in a second than it is told. Three models of random weights are merged by ties, in one part and in
one a machine, by workers that have started before: here all would start on the same processors.
The driver's own line has no limit: the sample for the card's drift is some megabytes for any size.
What `plan` foretells of bytes, requests and seconds is compared with what happens.

    python benchmarks/on_ray.py [--runs 3] [--machines 8] [--megabytes 40,80,160] [--line 1.5]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from elsewhere import LATENCY_SECONDS, NAMES, save_model
from measure import Figures, medians, progress, surroundings

import outliermerge
from outliermerge.output.cost import Machine, cost_of
from outliermerge.output.ray import run_on_ray
from outliermerge.planning.plan import Plan

RESULT = Path(__file__).parent / "results" / "on_ray.json"
COLUMNS = 512  # so that there are many tensors, and parts are about equal
LARGE_BYTES = 1 << 18


def serve(folder: Path, num_lines: int, bytes_per_second: float) -> None:
    """Serve a folder at so many ports, and the driver's, which has no limit.

    For each line of the input, say what was asked since.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from range_server import RangeServer

    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                RangeServer(folder, latency_seconds=LATENCY_SECONDS, bytes_per_second=each)
            )
            for each in (0, *[bytes_per_second] * num_lines)
        ]
        print(json.dumps([server.url for server in servers]), flush=True)
        for _ in sys.stdin:
            asked = [[stop - start for _, start, stop in server.ranges] for server in servers]
            for server in servers:
                server.ranges.clear()
            print(json.dumps(asked), flush=True)


class _Server:
    def __init__(self, num_lines: int, line: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(num_lines), "--line", str(line)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.urls: list[str] = self._said()

    def _said(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def asked(self) -> list[list[int]]:
        """Return by port the sizes of what was asked for since this was asked last."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: list[list[int]] = self._said()
        return found

    def end(self) -> None:
        self._process.communicate()


def cpu_seconds() -> float:
    """Return the processor time of this process and of all that it has started, directly or not."""
    tick, children, used = os.sysconf("SC_CLK_TCK"), dict[int, list[int]](), dict[int, float]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(path.parent.name)
        children.setdefault(int(words[1]), []).append(pid)
        used[pid] = sum(map(int, words[11:15])) / tick  # with those of children that have ended
    total, pending = 0.0, [os.getpid()]
    while pending:
        pid = pending.pop()
        total += used.get(pid, 0.0)
        pending += children.get(pid, [])
    return total


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import ray
    from ray.cluster_utils import Cluster

    os.chdir(folder)
    for size in options.megabytes:
        for seed, name in enumerate(NAMES):
            place = folder / "served" / "bucket" / str(size) / name
            save_model(place, size * 10**6, seed, columns=COLUMNS)
        at = f"s3://bucket/{size}"
        spec = {
            "merge_method": "ties",
            "base_model": f"{at}/base",
            "models": [{"model": f"{at}/{name}"} for name in NAMES[1:]],
            "parameters": {"density": 0.3},
        }
        Path(f"{size}.json").write_text(json.dumps(spec))
    server = _Server(options.machines, options.line)
    os.environ |= {
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.urls[0],  # the driver's
        "XDG_CACHE_HOME": str(folder / "cache"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    machines = sorted({1, options.machines})
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False}
    head["_system_config"] = {"worker_niceness": 0}  # each stands for a machine of its own
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for url in server.urls[1:]:
            cluster.add_node(num_cpus=1, env_vars={"AWS_ENDPOINT_URL": url})
        ray.init(address=cluster.address, log_to_driver=False)
        _one(options.megabytes[0], options.machines, server)  # starts the workers
        runs: dict[tuple[int, int], list[Figures]] = {}
        for number in range(options.runs):
            for size, num_parts in product(options.megabytes, machines):
                figures = _one(size, num_parts, server)
                runs.setdefault((size, num_parts), []).append(figures)
                progress(
                    f"{number + 1}/{options.runs}, {size} MB a model, {num_parts} parts: "
                    f"{figures['wall_seconds']:.1f} s"
                )
        plans = {size: outliermerge.plan(f"{size}.json") for size in options.megabytes}
    finally:
        ray.shutdown()
        cluster.shutdown()
        server.end()
    cases = []
    for (size, num_parts), each in runs.items():
        of_one = [run["wall_seconds"] for run in runs[size, 1]]
        times = [one / run["wall_seconds"] for one, run in zip(of_one, each, strict=True)]
        cases.append(
            {
                "gigabytes": round(plans[size].num_read_bytes / 1e9, 3),
                "line_megabytes_per_second": options.line,
                "machines": num_parts,
                "times_one": round(statistics.median(times), 2),
                "times_one_range": [round(min(times), 2), round(max(times), 2)],
                **medians(each),
                "foretold": foretold(plans[size], num_parts, options.line),
            }
        )
    return {
        **surroundings(options.runs, also=["obstore", "ray"]),
        "latency_milliseconds": LATENCY_SECONDS * 1000,
        "cases": cases,
    }


def foretold(plan: Plan, num_machines: int, line: float) -> dict[str, Any]:
    """Return what `plan` says of bytes, requests and seconds."""
    machine = Machine(line_bytes=line * 1e6, latency_seconds=LATENCY_SECONDS)
    return cost_of(plan, num_machines, machine).as_dict()


def _one(size: int, num_parts: int, server: _Server) -> Figures:
    """Merge models of a size in so many parts."""
    for name in ("out", "cache"):
        shutil.rmtree(name, ignore_errors=True)
    server.asked()
    before, began = cpu_seconds(), time.perf_counter()
    plan = outliermerge.plan(f"{size}.json")
    run_on_ray([(plan, Path("out"))], outliermerge.RunOptions(threads=1), num_parts=num_parts)
    figures = {"wall_seconds": time.perf_counter() - began}
    figures["cpu_seconds"] = cpu_seconds() - before
    asked = server.asked()
    figures["requests"] = sum(num > LARGE_BYTES for each in asked[1:] for num in each)
    figures["small_requests"] = sum(num <= LARGE_BYTES for each in asked for num in each)
    figures["gigabytes_fetched"] = (
        sum(num for each in asked[1:] for num in each if num > LARGE_BYTES) / 1e9
    )
    return {key: round(value, 4) for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--machines", type=int, default=8, help="of the cluster (default 8)")
    parser.add_argument(
        "--megabytes",
        type=lambda text: list(map(int, text.split(","))),
        default=[40, 80, 160],
        help="of a model, several sizes (default 40,80,160)",
    )
    parser.add_argument(
        "--line", type=float, default=1.5, help="megabytes a second of a machine (default 1.5)"
    )
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(Path("served"), options.serve, options.line * 1e6)
        return
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-"))
    try:
        result = measured(folder, options)
    finally:
        shutil.rmtree(folder)
    options.results.write_text(json.dumps(result, indent=1) + "\n")
    progress(f"wrote {options.results}")


if __name__ == "__main__":
    main()
