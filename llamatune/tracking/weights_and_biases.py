"""Weights & Biases: offline in the run directory, or sent as the run goes."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from llamatune.durable_writing import write_atomic
from llamatune.safe_reading import read_bytes
from llamatune.spec import RunSpec

_INIT_S, _FINISH_S = 20, 20


class WandbTracker:
    """One W&B run, continued by every process under the id that ``wandb/run-id`` in the run directory keeps.

    Told are the numbers and the resolved spec. What W&B would gather by itself (code, git, packages, the machine, its
    load, the console) it is told to leave alone, and a stop that is asked for on its pages stops nothing.

    Offline each process writes all steps to a directory of its own, which ``wandb sync`` sends; those of earlier
    processes, which may lack their last steps, are removed. Online W&B says how far it has come.
    """

    def __init__(self, spec: RunSpec, run: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        online, directory = spec.tracking.wandb == "online", run / "wandb"
        directory.mkdir(exist_ok=True)
        self._wandb = wandb
        settings = wandb.Settings(
            mode=spec.tracking.wandb,
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=_INIT_S,
            finish_timeout=_FINISH_S,
            stop_fn=lambda: None,
        )
        # Else W&B ends its service once more when the interpreter exits, where no fault is caught, no wait bounded.
        connection = getattr(wandb.setup(settings), "_connection", None)
        getattr(connection, "_cleanup", lambda: None)()
        if online and not wandb.login(prompt=False, verify=False):
            raise PermissionError("not logged in: run `wandb login`, or set tracking.wandb: offline")
        name = _run_id(directory / "run-id")
        try:
            self._run = wandb.init(
                project=spec.tracking.wandb_project,
                name=spec.tracking.wandb_name or run.resolve().name,
                id=name,
                resume="allow",
                dir=str(run),
                config=spec.model_dump(mode="json"),
                settings=settings,
            )
        except BaseException:
            with contextlib.suppress(BaseException):
                wandb.teardown(1)
            raise
        self.next_step: int = self._run.step
        if not online:
            for old in directory.glob(f"offline-run-*-{name}"):
                if not Path(self._run.dir).is_relative_to(old):
                    shutil.rmtree(old, ignore_errors=True)

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        self._run.log({**values, "_timestamp": time_s}, step=step)

    def close(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        finally:
            self._wandb.teardown(exit_code)


def _run_id(path: Path) -> str:
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:12].encode())
    return read_bytes(path).decode()
