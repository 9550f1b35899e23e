"""What it costs to merge models in an object store: whole processes, against the line.

An S3 server on the loopback, in a process of its own, answers each request 10 ms late, and sends no
more bytes in a second than it is told. Three models of random weights (base, two task models) are
merged from it; beside it the other way, which is to download them, and to merge then. --output
measures instead what it costs to write the output to the bucket while models are read from it.

    python benchmarks/elsewhere.py [--runs 3] [--megabytes 1000] [--line 40] [--method ties]
                                   [--output]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from measure import alternate, medians, progress, script, surroundings

from outliermerge.checkpoint.formats.safetensors_file import make_header
from outliermerge.checkpoint.sources import DTYPES

RESULTS = Path(__file__).parent / "results"
NAMES, LATENCY_SECONDS = ("base", "one", "two"), 0.010
COLUMNS = 2048
DOWNLOAD_AND_MERGE = """
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import obstore
from obstore.store import from_url
*command, spec, out = sys.argv[1:]
store = from_url("s3://bucket", client_options={"allow_http": True, "timeout": "1h"})
def fetch(meta):
    path = Path("downloaded") / meta["path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for piece in obstore.get(store, meta["path"]).stream(min_chunk_size=1 << 20):
            file.write(piece)
with ThreadPoolExecutor(16) as pool:
    list(pool.map(fetch, [meta for found in obstore.list(store) for meta in found]))
subprocess.run([*command, spec, out], check=True)
"""


def serve(folder: Path, bytes_per_second: float) -> None:
    """Serve a folder; at the end say how many requests for ranges there were, of which bytes."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from bucket_server import BucketServer

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    server = BucketServer(
        folder,
        latency_seconds=LATENCY_SECONDS,
        bytes_per_second=bytes_per_second,
        in_bytes_per_second=bytes_per_second,
    )
    with server:
        print(server.url, flush=True)
        ended.wait()
        asked = [stop - start for _, start, stop in server.ranges]
        large = sum(num_bytes > 1 << 18 for num_bytes in asked)
        counts = {
            "requests": len(asked),
            "large": large,
            "bytes": sum(asked),
            "writing": len(server.written),
            "bytes_in": sum(num_bytes for *_, num_bytes in server.written),
        }
        print(json.dumps(counts), flush=True)


class _Server:
    def __init__(self, line: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "served", "--line", str(line)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def end(self) -> dict[str, int]:
        """End it, and return what it has counted."""
        self._process.send_signal(signal.SIGTERM)
        counts: dict[str, int] = json.loads(self._process.communicate()[0])
        return counts


def save_model(folder: Path, num_bytes: int, seed: int, *, columns: int = COLUMNS) -> None:
    """Save layers of 16-bit noise, and what else a model's folder has."""
    folder.mkdir(parents=True)
    num_layers = max(1, num_bytes // (5 * 2 * columns * columns))
    names = [
        (f"model.layers.{layer}.{name}", DTYPES["float16"], (rows, columns))
        for layer in range(num_layers)
        for name, rows in (("attention", columns), ("up", 4 * columns), ("norm", 1))
    ]
    header, _ = make_header(names)
    draw = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for _, _, shape in names:
            file.write((draw.standard_normal(shape, dtype=np.float32) / 50).astype("<f2").tobytes())
    (folder / "config.json").write_text('{"model_type": "test"}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--megabytes", type=int, default=1000, help="of a model (default 1000)")
    parser.add_argument("--line", type=float, default=40, help="megabytes a second (default 40)")
    parser.add_argument("--method", default="ties", choices=["linear", "ties"])
    parser.add_argument("--output", action="store_true", help="write to the bucket, too")
    parser.add_argument("--results", type=Path, help="the JSON file to write")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    line = options.line * 1e6
    if options.serve is not None:
        serve(options.serve, line)
        return
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-"))
    try:
        result = measured(folder, options, line)
    finally:
        shutil.rmtree(folder)
    name = "elsewhere_output.json" if options.output else "elsewhere.json"
    file = options.results or RESULTS / name
    file.write_text(json.dumps(result, indent=1) + "\n")
    progress(f"wrote {file}")


def measured(folder: Path, options: argparse.Namespace, line: float) -> dict[str, Any]:
    for seed, name in enumerate(NAMES):
        save_model(folder / "served" / "bucket" / name, options.megabytes * 10**6, seed)
    os.chdir(folder)
    for at, spec in (("s3://bucket", "elsewhere.json"), ("downloaded", "here.json")):
        density = {"parameters": {"density": 0.3}} if options.method == "ties" else {}
        base = {"base_model": f"{at}/base"} if options.method == "ties" else {}
        names = NAMES[1:] if base else NAMES
        models = [{"model": f"{at}/{name}"} for name in names]
        Path(spec).write_text(
            json.dumps({"merge_method": options.method, "models": models, **base, **density})
        )
    os.environ |= {
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    merge = [script("outliermerge"), "run", "--no-load-check", "--quiet"]
    ways = {
        "by ranges": [*merge, "elsewhere.json", "out"],
        "download, then merge": [
            *(sys.executable, "-c", DOWNLOAD_AND_MERGE, *merge, "here.json", "out")
        ],
    }
    if options.output:
        ways = {
            "to a folder": [*merge, "elsewhere.json", "out"],
            "to the bucket": [*merge, "elsewhere.json", "s3://bucket/out"],
        }
    num_bytes = sum(path.stat().st_size for path in Path("served").rglob("*") if path.is_file())
    servers = {name: _Server(options.line) for name in ways}  # one each, to count its requests
    commands = {
        name: ["env", f"AWS_ENDPOINT_URL={servers[name].url}", *words]
        for name, words in ways.items()
    }

    def clean() -> None:
        for name in ("out", "downloaded", "cache", "served/bucket/out"):
            shutil.rmtree(name, ignore_errors=True)

    try:
        runs, failed = alternate(commands, options.runs, before=clean, label=options.method)
    finally:
        asked = {name: server.end() for name, server in servers.items()}
    if failed:
        raise SystemExit("\n".join(failed.values()))
    ideal = num_bytes / line
    figures = {name: medians(each) for name, each in runs.items()}
    of_ranges = asked["to the bucket" if options.output else "by ranges"]
    writing = {
        "written_over_the_output": round(
            of_ranges["bytes_in"] / options.runs / (num_bytes / len(NAMES)), 3
        ),
        "requests_that_write": round(of_ranges["writing"] / options.runs),
    }
    return {
        **surroundings(options.runs, also=["obstore"]),
        "method": options.method,
        "gigabytes": round(num_bytes / 1e9, 3),
        "line_megabytes_per_second": options.line,
        "latency_milliseconds": LATENCY_SECONDS * 1000,
        "seconds_of_the_line": round(ideal, 2),
        "over_the_line": {
            name: round(each["wall_seconds"] / ideal, 3) for name, each in figures.items()
        },
        "fetched_over_stored": round(of_ranges["bytes"] / options.runs / num_bytes, 3),
        "requests": round(of_ranges["requests"] / options.runs),
        "requests_for_more_than_256_kib": round(of_ranges["large"] / options.runs),
        **(writing if options.output else {}),
        "processes": figures,
    }


if __name__ == "__main__":
    main()
