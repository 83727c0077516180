"""Variables that Slurm sets, and a command that is quick."""

COUNT = ["count-params", "--preset", "llama-2-7b", "--json"]
STEP_OF_TWO = {
    "SLURM_JOB_ID": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2",
}  # as srun of Slurm 22.05 sets them
