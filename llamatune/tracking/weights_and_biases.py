"""The Weights & Biases tracker: offline in the run directory, or online."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from llamatune.durable_writing import write_atomic
from llamatune.errors import printable
from llamatune.safe_reading import read_bytes
from llamatune.spec import RunSpec

_INIT_S, _FINISH_S = 20, 20


class WandbTracker:
    """One W&B run; every process continues it under the id in ``wandb/run-id`` of the run directory.

    It gets the metrics and the resolved spec. W&B is set not to collect code, git, packages, the machine, its load or
    the console, and its stop button stops nothing.

    Offline, each process writes all steps to a directory of its own for ``wandb sync``; directories of earlier
    processes, which may lack their last steps, are removed. Online, W&B returns the last step that it has.
    """

    def __init__(self, spec: RunSpec, run: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        # A job on a node without a network turns an online run into an offline one, as with W&B's own settings.
        mode = "offline" if os.environ.get("WANDB_MODE") == "offline" else spec.tracking.wandb
        online, directory = mode == "online", run / "wandb"
        directory.mkdir(exist_ok=True)
        self._wandb = wandb
        settings = wandb.Settings(
            mode=mode,
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
        # Private, since no public call removes W&B's exit hook, which may wait without bound and print a traceback.
        connection = getattr(wandb.setup(settings), "_connection", None)
        getattr(connection, "_cleanup", lambda: None)()
        if online and not wandb.login(prompt=False, verify=False):
            raise PermissionError("not logged in: run `wandb login`, or set tracking.wandb: offline")
        identity = directory / "run-id"
        if not identity.exists():
            write_atomic(identity, uuid.uuid4().hex[:12].encode())
        run_id = read_bytes(identity).decode()
        try:
            self._run = wandb.init(
                project=spec.tracking.wandb_project,
                name=printable(spec.tracking.wandb_name or run.resolve().name),
                id=run_id,
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
            for old in directory.glob(f"offline-run-*-{run_id}"):
                if not Path(self._run.dir).is_relative_to(old):
                    shutil.rmtree(old, ignore_errors=True)

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        self._run.log({**values, "_timestamp": time_s}, step=step)

    def close(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        finally:
            self._wandb.teardown(exit_code)
