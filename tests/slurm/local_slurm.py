"""A real Slurm of two nodes on this machine: Debian's packages, a network namespace for each node, fake GPUs.

The nodes ``n1`` and ``n2`` see each other and nothing else. Each is a PID namespace as well, so that nothing of it
outlives its process 1 (``slurm_node.py``), which ends when this process closes a pipe, or dies. Slurm tracks processes
by the freezer of cgroup v1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

NODES = {"n1": "10.77.1.1", "n2": "10.77.1.2"}
GPUS = 2
CPUS = 8
"""What a node declares; real ones are shared by all."""

_FREEZER = Path("/sys/fs/cgroup/freezer")
_TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
_PACKAGES = ("slurm-wlm", "munge", "iproute2", "util-linux")

_CONFIGURATION = """\
ClusterName=llamatune-tests
SlurmctldHost=n1({n1})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={place}/munge.socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillOnBadExit=1
SlurmdTimeout=20
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
_NODE = (
    "NodeName={name} NodeAddr={address} Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} "
    "ThreadsPerCore=1 Gres=gpu:{gpus}"
)
_CGROUPS = f"""\
CgroupPlugin=cgroup/v1
CgroupAutomount=no
CgroupMountpoint={_FREEZER.parent}
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None if one can. Installs Debian's packages where they are missing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "Slurm's nodes need Linux and root"
    if not os.access(_FREEZER / "cgroup.procs", os.W_OK):
        return f"{_FREEZER} cannot be written: Slurm tracks a job's processes by it"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        if shutil.which("apt-get") is None:
            return f"no {', '.join(missing)}, and no apt-get to install them"
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *_PACKAGES]):
            done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
            if done.returncode:
                return f"apt-get {command[0]} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return _missing_right()


def _missing_right() -> str | None:
    """What this machine does not allow root to do, as in some containers."""
    links = "ip link add bridge0 type bridge && ip link add v0 type veth peer name v1 && ip link set v0 master bridge0"
    namespaces = ["unshare", "--net", "--pid", "--uts", "--mount", "--mount-proc", "--fork", "--kill-child"]
    done = subprocess.run([*namespaces, "sh", "-c", links], capture_output=True, text=True)
    if done.returncode:
        return f"no namespaces with networks of their own: {done.stderr.strip()}"
    with tempfile.TemporaryDirectory() as place:
        try:
            os.mknod(f"{place}/device", 0o20600, os.makedev(1, 3))
        except OSError as fault:
            return f"no device for a placeholder of a GPU: {fault.strerror}"
    return None


class LocalSlurm:
    """Started for the length of a ``with`` block; everything lies in ``place``, which is removed at the end."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="llamatune-slurm-"))
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self._environment |= {"SLURM_CONF": str(self.place / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._configure()
            for name in NODES:
                self.power_on(name)
            wait_for(self._is_ready, 30, "two idle nodes")
        except BaseException as fault:
            for log in sorted(self.place.glob("*.log")):
                fault.add_note(f"{log.name}: {log.read_text(errors='replace')[-1000:]}")
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for holder in self._holders.values():
            assert holder.stdin is not None
            holder.stdin.close()
        for holder in self._holders.values():
            try:
                holder.wait(30)
            except subprocess.TimeoutExpired:
                holder.kill()  # unshare, which takes process 1 with it
                holder.wait()
        shutil.rmtree(self.place)
        groups = [_FREEZER / f"slurm_{name}" for name in NODES]
        wait_for(lambda: not list(filter(_remains, groups)), 10, "end of what ran on the nodes")

    def _configure(self) -> None:
        self.place.chmod(0o755)  # munged wants a socket that everyone may reach
        nodes = [
            _NODE.format(name=name, address=address, port=17_100 + number, cpus=CPUS, gpus=GPUS)
            for number, (name, address) in enumerate(NODES.items())
        ]
        files = {
            "slurm.conf": _CONFIGURATION.format(place=self.place, nodes="\n".join(nodes), **NODES),
            "cgroup.conf": _CGROUPS,
            "gres.conf": f"NodeName=n[1-2] Name=gpu File={self.place}/nvidia[0-{GPUS - 1}]\n",
            "hosts": "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in NODES.items()),
        }
        for name, content in files.items():
            (self.place / name).write_text(content, encoding="utf-8")
        (self.place / "state").mkdir()
        for number in range(GPUS):
            os.mknod(self.place / f"nvidia{number}", 0o20600, os.makedev(1, 3))  # Slurm wants a character device
        (self.place / "munge.key").write_bytes(os.urandom(128))
        (self.place / "munge.key").chmod(0o600)

    def power_on(self, name: str) -> None:
        """Start a node. Its ``eth0`` is a bridge on n1; that of another node is plugged into it."""
        self._start(name)
        if name == "n1":
            self._link("add eth0 type bridge")
        else:
            self._link(f"add port-{name} type veth peer name eth0 netns {self._first_process(name)}")
            self._link(f"set port-{name} master eth0 up")

    def power_off(self, name: str) -> None:
        """End all processes of a node at once, and its network before, so that nobody hears of it."""
        self._link(f"delete port-{name}")
        self._holders[name].kill()  # unshare, which takes process 1 with it
        self._holders[name].wait()

    def _link(self, words: str) -> str:
        """``ip link`` in the network of n1."""
        command = ["nsenter", f"--target={self._first_process('n1')}", "--net", "ip", "link", *words.split()]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _start(self, name: str) -> None:
        munge = [f"--{kind}={self.place}/munge.{kind}" for kind in ("socket",)]
        munge += [f"--{kind}-file={self.place}/munge.{kind.split('-')[0]}" for kind in ("key", "pid", "log", "seed")]
        daemons = [["munged", "--foreground", *munge], ["slurmctld", "-D"]] if name == "n1" else []
        daemons.append(["slurmd", "-D", "-N", name])
        command = ["unshare", "--net", "--pid", "--uts", "--mount", "--mount-proc", "--fork", "--kill-child"]
        command += [sys.executable, str(Path(__file__).with_name("slurm_node.py"))]
        command += [name, NODES[name], str(self.place / "hosts"), *map(json.dumps, daemons)]
        with (self.place / f"{name}.log").open("ab") as log:
            self._holders[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    def _first_process(self, node: str) -> int:
        """The number of a node's process 1, as this machine counts."""
        holder = self._holders[node].pid
        children = Path(f"/proc/{holder}/task/{holder}/children")
        wait_for(lambda: children.read_text().split(), 10, f"process 1 of {node}")
        return int(children.read_text().split()[0])

    # Using it

    def run(self, *command: object, node: str = "n1", at: Path | None = None, **environment: str) -> str:
        """What a command on a node prints; raises if it fails."""
        words = ["nsenter", f"--target={self._first_process(node)}", "--net", "--uts", "--mount", "--pid"]
        words += ["sh", "-c", 'cd "$0" && exec "$@"', str(at or self.place), *map(str, command)]
        done = subprocess.run(
            words, env=self._environment | environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command} exited {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(self, script: Path, *options: str, at: Path, **environment: str) -> str:
        """The number of the job that was submitted in directory ``at``."""
        return self.run("sbatch", "--parsable", *options, script, at=at, **environment).strip()

    def _is_ready(self) -> bool:
        try:
            return self.run("sinfo", "-hN", "-o", "%T").split() == ["idle"] * len(NODES)
        except RuntimeError:  # slurmctld does not answer yet
            return False

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def wait(self, job: str, state: str, timeout_s: float) -> dict[str, str]:
        """Wait until the job is in ``state``; raise at once if it ends in another."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def arrived() -> bool:
            now = self.facts(job)["JobState"]
            assert now == state or now not in ends, f"job {job} is {now}"
            return now == state

        wait_for(arrived, timeout_s, f"job {job} in state {state}")
        return self.facts(job)

    def bring_back(self, node: str) -> bool:
        """Whether a node that was DOWN is usable again; it may come back by itself, and cannot be resumed then."""
        state = self.run("sinfo", "-hn", node, "-o", "%T").strip()
        if state.startswith("down"):
            with contextlib.suppress(RuntimeError):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        return state in ("idle", "mixed", "allocated")

    def processes(self, words: str = "") -> list[str]:
        """Command lines with ``words`` of all processes on the nodes, Slurm's own daemons apart."""
        spaces = {os.readlink(f"/proc/{self._first_process(node)}/ns/net") for node in NODES}
        lines = [line for space, line in _command_lines() if space in spaces and words in line]
        return [line for line in lines if not _is_daemon(line)]


def _remains(top: Path) -> bool:
    """Whether the cgroup ``top`` stays when it and those below it are removed: one of them has a process."""
    try:
        for group in sorted([top, *top.rglob("*/")], reverse=True):
            group.rmdir()
    except OSError:
        pass
    return top.exists()


def _command_lines() -> Iterator[tuple[str, str]]:
    """(network namespace, command line) of each process that has one; those that ended and are not reaped have none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if line:
                yield os.readlink(process / "ns" / "net"), line
        except OSError:  # it ended meanwhile
            continue


def _is_daemon(line: str) -> bool:
    return bool(re.match(r"(\S*/)?(munged|slurmctld|slurmd) |: slurmscriptd$|.*slurm_node\.py ", line))


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Return when the condition holds; it is looked at several times a second."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout_s:g} s")
        time.sleep(0.2)
