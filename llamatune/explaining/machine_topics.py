"""Topics of exit codes 5, 6, 75 and 130: the machine, numbers that are not finite, and stops."""

from __future__ import annotations

from llamatune.explaining.topics import topic

MACHINE_TOPICS = (
    topic(
        "out of memory",
        5,
        r"out of memory|nothing fits|does not fit into|cannot be pinned|page-locked|pinned",
        "A step, or generation, needs more memory than the device, its control group or the job has.",
        "error: out of memory on cuda:0: 22.90 GiB allocated, 23.10 GiB reserved: training.memory_limit=18433MiB",
        "Apply a remedy of the message; `llamatune plan-memory run.yaml --memory 24GiB` computes what fits without a "
        "GPU; `llamatune init` writes a spec that does.",
    ),
    topic(
        "an output that exists or cannot be written",
        5,
        r"exists|not empty|holds something else|what the demo wrote|cannot write|cannot open|cannot read|cannot keep|"
        r"not open for writing|no such directory|dangling|a pipe that|--overwrite would|not a regular file|"
        r"is never|names$|written with another|characters in names|permission",
        "What stands at an output is never replaced without being asked, and the directory must be there and writable.",
        "error: exists: report.html: choose another output, or pass --overwrite",
        "Choose another output, pass --overwrite, or make the directory writable.",
    ),
    topic(
        "the disk is full",
        5,
        r"no space|bytes and … are free|are free|needs … bytes|bytes and [\d,]+ are|\bdisk\b",
        "There is too little space, or a quota is used up. It is checked before a run begins, and nothing is left "
        "half-written.",
        "error: a checkpoint needs 2,400,000,000 bytes and 1,000,000 are free: runs/alpaca",
        "Free some space, or write elsewhere; training.keep_last: 1 keeps fewer checkpoints.",
    ),
    topic(
        "a directory in use",
        5,
        r"in use",
        "Another process writes there: two jobs were started for one run.",
        "error: in use by process 4711 on node07 since 09:12: runs/alpaca: wait for it or stop it",
        "Wait for the other, end it, or give another training.output_dir.",
    ),
    topic(
        "no such device, or one that cannot compute this",
        5,
        r"CUDA|device|no kernels|has no …|capability|GPU|bf16|TF32|NVML|deterministic|CUBLAS|torch\.compile",
        "The device is absent, the installed torch has no kernels for it, or it lacks what the spec asks for (a "
        "V100 or T4 has no bf16).",
        "error: Tesla T4 has no bf16: training.precision: set it to fp16",
        "`llamatune env` shows the devices, what they support, and which torch they need.",
    ),
    topic(
        "a package or program that is missing or too old",
        5,
        r"is too old|the package gguf|through the package|not installed|needs matplotlib|matplotlib|"
        r"needs the package|pip install|compile|cannot import|reads through|this installation",
        "Some verbs use packages that not every user needs, and every package has an oldest release that works.",
        "error: tensorboard is not installed: tracking.tensorboard: pip install tensorboard, or leave it out",
        "Install what the message names, in the environment that llamatune is in.",
    ),
    topic(
        "several processes that do not meet",
        5,
        r"\brank\b|\branks\b|WORLD_SIZE|srun|the port is|port \d|is not a number from|\bprocesses\b|MASTER_|differ on",
        "The processes of a run find each other by the launcher's variables (torchrun, srun, mpirun) and must have the "
        "same spec, data and versions.",
        "error: rank 1 of 2 found no rank 0 within 600 s: node01:29500",
        "Start them all by one launcher; `llamatune slurm` writes a batch script that does.",
    ),
    topic(
        "a helper process that died",
        5,
        r"worker process|a process to|did not start|process died|number of threads",
        "Rows and templates are read in processes of their own, and runs of a sweep trained in some; one of them could "
        "not be started, or was killed.",
        "error: a worker process died (SIGKILL): is there memory left?",
        "Free memory, or raise the limits of processes (ulimit -u, -v); give sweep a lower --at-once.",
    ),
    topic(
        "a loss or gradient that is not finite",
        6,
        r"not finite|at step … \(|… at step|at step \d+ \(|weights, |logits hold NaN|the base holds NaN|overflow|"
        r"no gradient|loss scale|diverge",
        "The numbers overflowed: mostly a learning rate that is too high, fp16 without room, or a row of odd content.",
        "error: the loss is not finite at step 41, among row 320 (bfloat16 weights, bf16): runs/alpaca",
        "Lower training.learning_rate, add warm-up, use bf16 where the GPU has it; look at the rows that are named.",
    ),
    topic(
        "stopped by a signal",
        75,
        r"stopped|interrupted|passes of a window|signal|SIGTERM|SIGUSR1|Ctrl-C|requeue|runs are finished",
        "A signal asked for a stop (Ctrl-C, a time limit, scancel). A run has saved a checkpoint; verbs that only read "
        "end with 130.",
        "error: stopped by a signal after step 120 of 900: runs/alpaca: run the same command again to continue",
        "Run the same command again; `llamatune slurm` writes a script that requeues itself.",
    ),
)
