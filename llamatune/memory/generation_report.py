"""The report of a memory plan of generation: its moments, what else would fit, and what would lower the peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llamatune.memory.generation import GenerationPlan, HeldModel, Work, plan_generation
from llamatune.memory.plan import largest
from llamatune.memory.remedies import Remedy
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.shapes.gpu_advice import sixteen_bits

_MOST_ROWS = 1 << 16


def generation_report(model: HeldModel, work: Work, limit_bytes: int | None) -> dict[str, Any]:
    """The plan as JSON; under a limit with the largest work that fits, and remedies if the plan does not.

    All of it is for as many rows at once as the plan has. Lengths are tried up to the model's context, or to what was
    given if that is more. A largest of 0: none fits.
    """
    plan = plan_generation(model, work, limit_bytes)
    work = replace(work, rows=plan.rows) if work.beams == 1 else work
    facts = {
        "predicted_peak_memory_bytes": plan.memory.peak,
        "predicted_memory_bytes": dataclasses.asdict(plan.memory),
        "moments": [
            {"step": step, "bytes": memory.peak, "memory_bytes": dataclasses.asdict(memory)}
            for step, memory in plan.moments.items()
        ],
        "device": "cuda" if model.cuda else "cpu",
        "dtype": model.dtype,
        "prompt_tokens": work.prompt_tokens,
        "max_new_tokens": work.new_tokens,
        "rows": plan.rows if work.beams == 1 else None,
        "num_beams": work.beams,
        "room_tokens": plan.room_tokens,
        "memory_limit_bytes": limit_bytes,
        "fits": None if limit_bytes is None else plan.fits,
    }
    if limit_bytes is None:
        return facts

    def fits(**changes: Any) -> bool:
        return plan_generation(model, replace(work, **changes), limit_bytes).fits

    context = model.config.max_position_embeddings
    most = {
        "new_tokens": largest(lambda n: fits(new_tokens=n), max(work.new_tokens, context - work.prompt_tokens)),
        "prompt_tokens": largest(lambda n: fits(prompt_tokens=n), max(work.prompt_tokens, context - work.new_tokens)),
    }
    if work.beams > 1:
        most["beams"] = 1 + largest(lambda n: fits(beams=1 + n), work.beams - 1)
    else:
        most["rows"] = largest(lambda n: fits(rows=n), work.prompts or _MOST_ROWS)
    return facts | {
        "largest_rows": most.get("rows"),
        "largest_max_new_tokens": most["new_tokens"],
        "largest_prompt_tokens": most["prompt_tokens"],
        "remedies": [] if plan.fits else [dataclasses.asdict(remedy) for remedy in _remedies(model, work, plan, most)],
    }


def _remedies(model: HeldModel, work: Work, plan: GenerationPlan, most: dict[str, int]) -> list[Remedy]:
    """Every change that is not made yet and lowers the peak by more than a thousandth, each by itself."""
    helpful = []
    for change, effect, held, asked in _changes(model, work, plan, most):
        after = plan_generation(held, asked, plan.limit_bytes)
        saved = plan.memory.peak - after.memory.peak
        if saved > plan.memory.peak // 1000:
            helpful.append(Remedy(change, effect, None, after.memory.peak, saved, after.fits))
    return helpful


def _changes(
    model: HeldModel, work: Work, plan: GenerationPlan, most: dict[str, int]
) -> Iterator[tuple[str, str, HeldModel, Work]]:
    """The change, its effect, and what is planned with it; first those that change no text."""
    _, sixteen = sixteen_bits(model.cuda)
    if work.beams == 1 and (rows := max(1, most["rows"])) < plan.rows:
        effect = "of evaluate; of generate so many prompts in a call"
        yield f"--batch-size {rows}", effect, model, replace(work, rows=rows)
    if work.compare:
        yield "without --compare", "one model's keys and values", model, replace(work, compare=False)
    if model.others == "float32":
        yield f"--dtype {sixteen}", "all in 16 bits", replace(model, dtype=sixteen, others=sixteen), work
    packed = replace(model, others=sixteen if model.others == "float32" else model.others)
    for dtype, bits in (("int8", 8), ("nf4", 4)):
        if dtype != model.dtype and model.dtype != "nf4" and not (bits == 8 and model.dtype in QUANTIZED_DTYPES):
            yield f"--dtype {dtype}", f"the blocks' matrices in {bits} bits", replace(packed, dtype=dtype), work
    if 0 < (new := most["new_tokens"]) < work.new_tokens:
        yield f"--max-new-tokens {new}", "shorter completions", model, replace(work, new_tokens=new)
    if 0 < (prompt := most["prompt_tokens"]) < work.prompt_tokens:
        shorter = replace(work, prompt_tokens=prompt)
        yield f"--prompt-tokens {prompt}", "without the prompts that are longer", model, shorter
    if 1 < (beams := most.get("beams", 0)) < work.beams:
        yield f"--num-beams {beams}", "fewer beams", model, replace(work, beams=beams)
