"""Prompts that a run answers at its evaluations: read or drawn before it begins, answered greedily by its model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.inference import Sampling
from llamatune.data.chat_template_files import own_chat_template
from llamatune.data.segments import Segments
from llamatune.data.template_choice import stored_template
from llamatune.devices import free_memory_bytes
from llamatune.errors import DataError, SpecError, Stopped
from llamatune.events import Answer, AnswersDone, Notice, OnEvent, Progress, ShouldStop
from llamatune.formats.prepared import read_prepared_manifest
from llamatune.inference.completion import Completion
from llamatune.inference.engine import Engine
from llamatune.inference.prepared_prompts import PreparedPrompt, draw_split
from llamatune.inference.prompt_encoding import PromptEncoder, encode_prompts, is_chat, shown_answer
from llamatune.inference.prompt_files import FilePrompt, Prompt, read_prompts
from llamatune.model.compiled_functions import compiling
from llamatune.model.plain_blocks import answering
from llamatune.ranks import Ranks
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE, rows_that_fit
from llamatune.spec import RunSpec
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer, check_vocabulary
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner

_SHARE = 0.5
"""Of the free memory, what keys and values of the answers may take: training needs it again."""
_LONGEST_SHOWN = 4000
"""Characters of a prompt or reference that are kept; of a longer prompt the end, which is what is answered."""


@dataclass(frozen=True)
class _Asked:
    """A prompt as it is shown: its segments and ids, and the answer that its row has."""

    segments: Segments
    ids: list[int]
    reference: str | None


@dataclass(frozen=True)
class RunPrompts:
    """The prompts of ``evaluation.prompts``, in the template of the training rows.

    Args:
        ids: of each prompt, BOS included.
        end_ids: the tokens that end an answer.
        asked: on the first rank, what it shows with the answers; empty on the others.
    """

    ids: list[list[int]]
    end_ids: frozenset[int]
    sampling: Sampling
    asked: Sequence[_Asked]
    tokenizer: Tokenizer | None

    def answer(
        self, learner: Learner, step: int, should_stop: ShouldStop, on_event: OnEvent, ranks: Ranks
    ) -> AnswersDone:
        """Answer every prompt greedily; nothing of the training changes. The answers themselves are the first rank's.

        Ranks that hold slices of the weights compute all answers together; otherwise the others wait for the first.

        Raises:
            Stopped: ``should_stop`` asked for it, between two tokens.
        """
        started, made = time.monotonic(), dict[int, Completion]()
        together = ranks.size > 1 and learner.idle_forward is not None
        if together or ranks.is_first:
            with compiling(False), answering(learner.model, learner.streamed), learner.autocast():
                rows = self._rows(learner)
                engine = Engine(learner.model, self.end_ids, ranks.from_first(rows) if together else rows, trains=True)
                for ids in self.ids:
                    engine.add(ids, self.sampling)
                while not (engine.is_done or (ranks.any(should_stop()) if together else should_stop())):
                    made.update(engine.step())
                    on_event(Progress("answering", len(made), len(self.ids)))
        if not together:
            ranks.wait()
        if not ranks.from_first(len(made) == len(self.ids)):
            raise Stopped("stopped while answering prompts")
        answers = [self._shown(step, number, asked, made[number]) for number, asked in enumerate(self.asked)]
        return AnswersDone(step, tuple(answers), time.monotonic() - started)

    def _rows(self, learner: Learner) -> int:
        """The answers that are computed side by side."""
        model, most = learner.model, max(map(len, self.ids)) + self.sampling.max_new_tokens
        free, draws = free_memory_bytes(model.device), self.sampling.temperature > 0
        fitting = rows_that_fit(model.config, model.product_dtype.itemsize, most, draws, free, share=_SHARE)
        return min(ROWS_AT_ONCE[model.device.type], len(self.ids), fitting)

    def _shown(self, step: int, number: int, asked: _Asked, made: Completion) -> Answer:
        assert self.tokenizer is not None
        text, reference = shown_answer(self.tokenizer, asked.segments, asked.ids, made.ids), asked.reference
        return Answer(
            step,
            number + 1,
            asked.segments.shown[-_LONGEST_SHOWN:],
            text,
            None if reference is None else reference[:_LONGEST_SHOWN],
            len(made.ids),
            made.finish_reason,
        )


def open_run_prompts(spec: RunSpec, inputs: Inputs, on_event: OnEvent, ranks: Ranks) -> RunPrompts | None:
    """The prompts that the spec asks for, or None; the first rank reads them.

    Raises:
        DataError: a prompt that cannot be used, or rows without prompts.
        SpecError: there is no row to draw from.
        CheckpointError: the base's tokenizer cannot be used.
    """
    if spec.evaluation.prompts is None:
        return None
    sampling = Sampling(spec.evaluation.max_new_tokens, temperature=0)
    asked, end_ids, tokenizer = list[_Asked](), set[int](), None
    if ranks.is_first:
        base, manifest = Path(spec.model.path), inputs.prepared.manifest
        tokenizer = load_tokenizer(base)
        check_vocabulary(tokenizer, inputs.config.vocab_size, base)
        template = None if manifest.template is None else stored_template(manifest.template, manifest.path)
        prompts = _prompts(spec, inputs, tokenizer, on_event)
        if template is None and any(map(is_chat, prompts)):
            template = own_chat_template(tokenizer, on_event=on_event)
        encoder = PromptEncoder(tokenizer, template)
        end_ids = encoder.stop_ids(inputs.config) | (set() if manifest.end_of_turn is None else {manifest.end_of_turn})
        segments = [encoder.segments(prompt, number) for number, prompt in enumerate(prompts, 1)]
        ids = encode_prompts(tokenizer, segments, [inputs.config], base, sampling.max_new_tokens, on_event)
        references = [prompt.reference for prompt in prompts if isinstance(prompt, FilePrompt | PreparedPrompt)]
        asked = [_Asked(*each) for each in zip(segments, ids, references, strict=True)]
    shared_ids, shared_ends = ranks.from_first(([each.ids for each in asked], sorted(end_ids)))
    return RunPrompts(shared_ids, frozenset(shared_ends), sampling, asked, tokenizer)


def _prompts(spec: RunSpec, inputs: Inputs, tokenizer: Tokenizer, on_event: OnEvent) -> list[Prompt]:
    """From the file, or so many rows drawn by the seed: of validation, or of training where there are no others."""
    wanted = spec.evaluation.prompts
    if isinstance(wanted, str):
        return read_prompts(Path(wanted), on_event=on_event)
    assert wanted is not None
    directories, split = spec.data.validation_paths, "train"
    if not directories:
        directories, split = spec.data.train_paths, "train" if inputs.validation is None else "validation"
    drawn = list[Prompt]()
    for place, directory in enumerate(directories):
        count = -(-(wanted - len(drawn)) // (len(directories) - place))  # those of the others are shared out alike
        manifest = read_prepared_manifest(directory)
        try:
            drawn += draw_split(directory, split, count, manifest, spec.training.seed, tokenizer)
        except DataError as fault:
            raise DataError(fault.what, fault.where, "name a file of prompts in evaluation.prompts") from None
    if not drawn:
        raise SpecError("no row has a prompt", "evaluation.prompts", "name a file of prompts")
    kind = "training rows: there are no validation rows" if inputs.validation is None else "validation rows"
    found = "" if len(drawn) == wanted else f" of the {wanted} that are asked for"
    on_event(Notice(f"evaluation.prompts: {len(drawn)}{found}, {kind}"))
    return drawn
