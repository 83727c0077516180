"""One rank of the tests of ranks: python rank_process.py CASE TIMEOUT_S."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

import torch

from llamatune.errors import CheckpointError, FailedElsewhere, LlamatuneError, NumericsError
from llamatune.process_group import connected
from llamatune.ranks import Ranks


def send(ranks: Ranks) -> None:
    """Every kind of message."""
    assert ranks.gather({"rank": ranks.rank}) == [{"rank": rank} for rank in range(ranks.size)]
    assert ranks.from_first("x" * 1000 if ranks.is_first else None) == "x" * 1000
    assert ranks.any(ranks.rank == 1)
    assert not ranks.any(False)
    assert ranks.all_gather(torch.tensor([ranks.rank])).tolist() == [[rank] for rank in range(ranks.size)]
    # Rank r sends r * 10 + s to rank s, r + 1 times: shapes may differ.
    sent = [torch.full((ranks.rank + 1, 2), ranks.rank * 10.0 + rank) for rank in range(ranks.size)]
    received = ranks.all_to_all(sent, [torch.Size((rank + 1, 2)) for rank in range(ranks.size)])
    for rank, tensor in enumerate(received):
        assert torch.equal(tensor, torch.full((rank + 1, 2), rank * 10.0 + ranks.rank))


def work(ranks: Ranks, case: str, timeout_s: float) -> None:
    name, _, number = case.partition("-")
    mine = number == str(ranks.rank)
    if name == "send":
        send(ranks)
    elif name == "slow":  # a save or load may take longer than the timeout
        if ranks.is_first:
            time.sleep(2 * timeout_s)
        ranks.wait()
        return
    elif mine and name in ("kill", "stop", "freeze"):
        Path("ready").touch()
        os.kill(os.getpid(), signal.SIGKILL if name == "kill" else signal.SIGSTOP)
    elif name == "freeze":  # the others ask the store alone whether all are alive
        ranks.wait()
    elif mine and name == "error":
        raise CheckpointError("a bad file", "here", "mend it")
    elif mine and name == "memory":
        raise MemoryError
    elif name == "everywhere":
        raise NumericsError("not finite")
    for _ in range(5):
        ranks.all_gather(torch.zeros(4))
        time.sleep(0.1)
    ranks.wait()


def stop_while_connecting() -> None:
    """This rank, between its two process groups."""
    import torch.distributed as dist

    dist.new_group = lambda **_: os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    if sys.argv[1] == f"connect-{os.environ['RANK']}":
        stop_while_connecting()
    try:
        with connected("cpu", float(sys.argv[2])) as ranks:
            work(ranks, sys.argv[1], float(sys.argv[2]))
    except FailedElsewhere as fault:
        sys.exit(fault.exit_code)
    except LlamatuneError as fault:
        sys.stderr.write(f"error: {fault}\n")
        sys.exit(fault.exit_code)
    except MemoryError:
        sys.stderr.write("error: out of memory\n")
        sys.exit(5)
