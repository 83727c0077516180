"""Process 1 of a node of ``local_slurm``, in namespaces of its own: sets up its network and starts its daemons.

It runs until its standard input is closed, also by the death of whoever holds it, and then stops the daemons. With
process 1 the kernel ends every other process of the namespace.

Arguments: host name, address, hosts file, and one command (a JSON list) for each daemon, in the order of their start.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time

STOPPING_S = 10.0


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    name, address, hosts, *daemons = sys.argv[1:]
    socket.sethostname(name)
    run("mount", "--bind", hosts, "/etc/hosts")
    while "eth0" not in (link for _, link in socket.if_nameindex()):  # whoever started this makes it
        if select.select([0], [], [], 0.02)[0]:
            return
    run("ip", "address", "add", f"{address}/24", "dev", "eth0")
    for link in ("lo", "eth0"):
        run("ip", "link", "set", link, "up")
    started = [subprocess.Popen(json.loads(daemon), stdin=subprocess.DEVNULL) for daemon in daemons]
    while not select.select([0], [], [], 0.2)[0]:
        reap()
    for daemon in reversed(started):
        daemon.terminate()
    deadline = time.monotonic() + STOPPING_S
    while reap() and time.monotonic() < deadline:
        time.sleep(0.05)


def reap() -> bool:
    """Take note of children that ended, adopted ones too; whether there are others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    main()
