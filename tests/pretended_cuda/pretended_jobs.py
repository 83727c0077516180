"""What a process with a pretended GPU runs: training steps of any technique with an evaluation, or generation.

As a program it reads jobs from stdin and writes what each came to to stdout, one line of JSON each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pretended_cuda

Found = dict[str, Any]
"""``error`` of a job (None: there is none), ``kernels`` of attention, and ``waits``: of each part, how many of each
``[place, kind]``, and ``replays`` of captured steps."""


def main(library: str) -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed does not mix with the results
    pretended_cuda.start(library)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=results, flush=True)


def run(job: dict[str, Any]) -> Found:
    """One job: ``kind``, ``capability``, perhaps a ``fault`` to plant, and what the kind wants."""
    import torch
    from attention_choice import Recorder
    from planted_faults import planted

    capability = (job["capability"][0], job["capability"][1])
    pretended_cuda.install_gpu(capability)
    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default
    waits: dict[str, list[Any]] = {}
    error, recorder = None, Recorder(capability)
    with planted(job.get("fault")), recorder, pretended_cuda.device_class()() as device:

        def done(part: str) -> None:
            waits[part] = [[place, kind, count] for (place, kind), count in sorted(device.waits.items())]
            device.waits.clear()

        try:
            {"step": training_step, "generation": generation, "generation cell": generation_cell}[job["kind"]](
                job, done
            )
        except Exception as fault:
            error = f"{type(fault).__name__}: {fault}"
            traceback.print_exc()
    kernels = recorder.kernels | ({"varlen"} if "torch_attn" in device.libraries else set())
    replays, pretended_cuda.Graph.replays = pretended_cuda.Graph.replays, 0
    return {"error": error, "kernels": sorted(kernels), "waits": waits, "replays": replays}


LENGTHS = {"equal": [7] * 6, "one": [5, 2, 9, 3, 11, 4], "ragged": [5, 2, 9, 3, 11, 4], "packed": [5, 2, 9, 3, 11, 4]}
"""Tokens of the samples by kind of rows."""


def rows_file(lengths: list[int], path: Path) -> Any:
    """Rows of these lengths; all but the first token of each are targets."""
    import torch
    from safetensors.torch import save_file

    from llamatune.data.batches import Split

    ends = torch.tensor(lengths).cumsum(0)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), ends))
    mask = torch.ones(int(ends[-1]), dtype=torch.uint8)
    mask[offsets[:-1]] = 0
    ids = torch.arange(int(ends[-1]), dtype=torch.int32) % 97
    save_file(
        {"input_ids": ids, "loss_mask": mask, "offsets": offsets, "source_rows": torch.arange(len(lengths))}, path
    )
    return Split(path)


def training_step(job: dict[str, Any], done: Any) -> None:
    """Build a learner, train on a window of one pass and one of two, and compute the validation loss.

    The job: ``spec``, ``shape`` of the model and ``rows``.
    """
    from llamatune.devices import choose_device
    from llamatune.events import ignore_event, never_stop
    from llamatune.inference.evaluate import held_out_loss
    from llamatune.shapes.counts import count_parameters
    from llamatune.shapes.llama_config import LlamaConfig
    from llamatune.spec import build_spec
    from llamatune.training.determinism import deterministic_kernels
    from llamatune.training.inputs import Inputs
    from llamatune.training.model_and_optimizer import build_learner
    from llamatune.training.passes import PassRule
    from llamatune.training.precision import check_precision, fp32_products
    from llamatune.training.schedule import Schedule
    from llamatune.training.training_step import make_update

    spec, config = build_spec(job["spec"], "the job"), LlamaConfig(**job["shape"])
    with tempfile.TemporaryDirectory() as folder:
        split = rows_file(LENGTHS[job["rows"]], Path(folder) / "rows.safetensors")
    device = choose_device(spec.training.device)
    check_precision(spec, device, ignore_event)
    count = count_parameters(config, spec.adapter)
    no_data: Any = None  # building a learner opens none
    inputs = Inputs(config, None, "", no_data, None, None, {}, count, device)
    with deterministic_kernels(spec.training.deterministic, device), fp32_products(spec.training.precision):
        learner = build_learner(spec, inputs, ignore_event, never_stop)
        done("building")
        rule = PassRule(lanes=None) if spec.adapter is None else PassRule()
        schedule = Schedule(spec, split)
        passes = schedule.passes(0, rule)
        assert len(passes) == 2
        for window, part in enumerate(("first window", "window")):
            update = make_update(learner, passes[: 1 + window], spec.training, window, 1e-3, lanes=rule.lanes)
            assert update.made
            done(part)
        held_out_loss(learner.model, split, len(split), learner.autocast)
        done("evaluation")


def generation(job: dict[str, Any], done: Any) -> None:
    """Load the model ``base``, put an adapter on it if ``adapter``, and continue prompts of ``lengths``.

    The job also: ``dtype``, the number of ``tokens``, fields of ``Sampling`` in ``sampling``; ``compare``: each
    prompt is continued without the adapter too; ``merge``: the adapter is merged where it survives rounding.
    """
    from llamatune.command_options.inference import ModelSource, Sampling
    from llamatune.events import ignore_event, never_stop
    from llamatune.inference.engine import completions
    from llamatune.inference.merging_in_memory import merge_in_memory
    from llamatune.inference.model_source import open_model
    from llamatune.model.adapters.apply import apply_adapter, switch_of
    from llamatune.shapes.adapter import AdapterSpec

    opened = open_model(ModelSource(Path(job["base"]), dtype=job["dtype"], device="cuda"))
    (model,) = opened.load(ignore_event, never_stop).by_prefix.values()
    if job["adapter"]:
        apply_adapter(model, AdapterSpec(4, 8.0, 0.0, ("q_proj", "down_proj")))
        model.eval()
    if job["merge"]:
        merge_in_memory(model, False, "the adapter", ignore_event, never_stop)
    done("loading")
    prompts = [[1] * length for length in job["lengths"]]
    sampling, compare = Sampling(max_new_tokens=job["tokens"], **job["sampling"]), job["compare"]
    switch, rows = switch_of(model) if compare else None, len(prompts) * (1 + compare)
    assert len(list(completions(model, prompts, sampling, [2], rows, switch=switch))) == rows
    done("generation")


def generation_cell(job: dict[str, Any], done: Any) -> None:
    """Measure a cell of ``benchmark --generate`` of the model ``base``: ``rows``, ``tokens`` and ``repetitions``."""
    from llamatune.benchmarking.measure_generation import GenerationTask, measure_generation
    from llamatune.command_options.inference import ModelSource
    from llamatune.inference.model_source import open_model

    source = ModelSource(Path(job["base"]), dtype=job["dtype"], device="cuda")
    task = GenerationTask(source, job["rows"], 5, job["tokens"], job["repetitions"])
    found = measure_generation(task, open_model(source))
    assert found["device_name"] == "a pretended GPU"
    done("cell")


if __name__ == "__main__":
    main(sys.argv[1])
