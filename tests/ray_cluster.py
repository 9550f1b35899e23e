"""A Ray cluster of several nodes on this machine, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from documents import ROOT


@contextmanager
def cluster_of(num_nodes: int, *places: Path) -> Iterator[Any]:
    """Yield a cluster: a head without processors, and nodes of one processor each.

    Args:
        places: folders from which its workers can import.
    """
    from ray import cluster_utils

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *map(str, places), before]))
    config = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
    config["worker_niceness"] = 0  # else workers wait for all else that this machine does
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": config}
    started = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_nodes):
            started.add_node(num_cpus=1)
        yield started
    finally:
        started.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
