"""A small real Slurm on this host, from Debian's packages: munged, slurmctld and slurmd."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin"
NUM_CPUS = 4  # of the node, whatever the machine has
START_SECONDS = 60

_CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return in words why Slurm cannot be tried here; empty if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install munge slurmctld slurmd)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


class CannotStart(Exception):
    """Slurm does not start on this machine."""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start Slurm with all its files in a folder; yield the environment of its commands.

    Raises:
        CannotStart: it does not start.
    """
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        _CONFIG.format(
            folder=folder,
            host=host,
            cpus=NUM_CPUS,
            controller_port=_free_port(),
            node_port=_free_port(),
        )
    )
    environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    # Nothing here uses cgroups. Before version 23 the plugin could not be left out.
    plugin = "cgroup/v1" if _version() < 23 else "disabled"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
    files = {
        "--key-file": "munge.key",
        "--socket": "munge.socket",
        "--log-file": "munge.log",
        "--pid-file": "munge.pid",
        "--seed-file": "munge.seed",
    }
    munged = ["munged", "--foreground", "--force"]
    munged += [f"{flag}={folder / name}" for flag, name in files.items()]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with (folder / f"{command[0]}.out").open("wb") as file:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=folder)
                )
            if command is munged:
                _wait(lambda: (folder / "munge.socket").exists(), daemons, folder)
        _wait(lambda: _state(environment).startswith(("idle", "mix")), daemons, folder)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _version() -> int:
    """Return the year of Slurm's version."""
    done = subprocess.run(
        ["sinfo", "--version"], env={"PATH": PATH}, capture_output=True, text=True, check=False
    )
    found = re.search(r"(\d+)\.", done.stdout)
    return int(found[1]) if found else 0


def _state(environment: dict[str, str]) -> str:
    command = ["sinfo", "--noheader", "--format=%T"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout


def _wait(found: object, daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not found():  # type: ignore[operator]
        ended = [daemon.args[0] for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > end:
            said = "\n".join(
                f"{path.name}: {path.read_text(errors='replace')[-400:]}"
                for path in sorted([*folder.glob("*.out"), *folder.glob("*.log")])
            )
            raise CannotStart(f"{ended or 'the node'} did not start:\n{said}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
