"""Sample answers before and after tuning: of prepared rows or prompts, generated, or read from a file of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.command_options.training import ReportOptions
from llamatune.data.templates import Template
from llamatune.errors import CheckpointError, DataError, LlamatuneError, SpecError, printable
from llamatune.events import OnEvent, ShouldStop
from llamatune.formats.manifest import find_manifest
from llamatune.inference.prepared_prompts import HEADINGS, PreparedPrompt, PreparedRows, draw_prompts
from llamatune.reporting.run_reader import Run
from llamatune.safe_reading import read_bytes
from llamatune.strict_json import parse_json
from llamatune.training.run_file_names import ADAPTER, MODEL

if TYPE_CHECKING:
    from llamatune.data.chat_template import ChatTemplate
    from llamatune.inference.generate import Generation
    from llamatune.inference.prompt_files import Prompt

_LARGEST_FILE = 64 << 20


@dataclass(frozen=True)
class Sample:
    """A prompt as the model read it and its answers; ``base`` is the untuned model's, None if there is none.

    ``instruction`` is the prompt without its template, None if it is not of a known one. ``split``, ``row`` and
    ``reference`` (the row's own answer) are those of a row.
    """

    prompt: str
    base: str | None
    tuned: str
    instruction: str | None = None
    split: str | None = None
    row: int | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Samples:
    """Answers from one source: the name of a run or of a file."""

    source: str
    samples: list[Sample]


def known_template(run: Run) -> Template | None:
    """The template of a run's rows, stored with its weights; None: there is none, or it is a chat's."""
    for name in (ADAPTER, MODEL):
        try:
            manifest = find_manifest(run.path / name)
            if manifest is not None and manifest.template is not None and "chat_template" not in manifest.template:
                return Template.from_dict(manifest.template, run.path / name)
        except LlamatuneError:
            return None  # generating with it gives the reason
    return None


def instruction_of(prompt: str, templates: Sequence[Template]) -> str | None:
    """What was filled into the template of ``prompt``: its fields, a blank line between them."""
    for template in templates:
        fields = template.fields_of(prompt)
        if fields:
            return "\n\n".join(text for text in fields.values() if text)
    return None


def read_generations(path: Path, templates: Sequence[Template] = ()) -> Samples:
    """Read the JSON Lines of ``llamatune generate --output``, with ``--compare`` or without.

    Raises:
        DataError: no such file, or a line of another format.
    """
    samples = []
    for number, line in enumerate(read_bytes(path, DataError, _LARGEST_FILE).splitlines(), 1):
        try:
            samples.append(_sample_of(parse_json(line), templates))
        except (ValueError, KeyError, TypeError):
            todo = "give a file that llamatune generate --compare --output wrote"
            raise DataError("not a line with prompt and completion", f"{path}:{number}", todo) from None
    return Samples(printable(path.name), samples)


def _sample_of(values: Any, templates: Sequence[Template]) -> Sample:
    """A line of output; ``ValueError``, ``KeyError`` or ``TypeError`` where it is none."""
    prompt, split, row = values["prompt"], values.get("split"), values.get("row")
    texts = {"base": values.get("base_completion"), "reference": values.get("reference")}
    given = [prompt, values["completion"], *(text for text in texts.values() if text is not None)]
    is_row = row is None or (type(row) is int and 0 < row < 1 << 53)
    if not all(isinstance(text, str) for text in given) or not is_row or split not in (None, *HEADINGS):
        raise TypeError
    found = instruction_of(prompt, templates)
    return Sample(prompt, texts["base"], values["completion"], found, split, row, texts["reference"])


def generate_samples(
    run: Run, prompts: Sequence[Prompt], options: ReportOptions, on_event: OnEvent, should_stop: ShouldStop
) -> Samples:
    """Answer ``prompts`` greedily with the base and with the last weights of ``run``.

    Raises:
        SpecError: the run did not train the base on disk. CheckpointError: no weights yet, or they do not load.
    """
    spec = run.spec
    if spec.model.init == "random" or spec.model.num_layers is not None:
        raise SpecError("its base is not the model on the disk", run.path, "leave --prompt out, or pass --generations")
    if _trained(run) is None:
        raise CheckpointError("no trained weights yet", run.path, "leave --prompt out, or let the run finish")
    templates = list(filter(None, [known_template(run)]))
    pairs = _ask(run, prompts, options, on_event, should_stop)
    samples = [Sample(new.prompt, old, new.completion, instruction_of(new.prompt, templates)) for old, new in pairs]
    return Samples(run.name, samples)


def generate_rows(run: Run, options: ReportOptions, on_event: OnEvent, should_stop: ShouldStop) -> Samples | str:
    """Answer rows from inside and outside the training set of ``run``, drawn by ``options.seed``; or why not.

    Raises:
        CheckpointError: weights that do not load. DataError: prepared rows that cannot be used.
    """
    if reason := _not_at_hand(run):
        return f"no answers of rows: {reason}"
    prompts = _draw(run, options, on_event)
    templates = list(filter(None, [known_template(run)]))
    samples = [
        Sample(
            new.prompt, old, new.completion, instruction_of(new.prompt, templates),
            prompt.split, prompt.row, prompt.reference,
        )
        for prompt, (old, new) in zip(prompts, _ask(run, prompts, options, on_event, should_stop), strict=True)
    ]  # fmt: skip
    return Samples(run.name, samples)


def _not_at_hand(run: Run) -> str:
    """Why a run's rows cannot be answered here; empty: they can."""
    model = run.found.model
    if model.init == "random" or model.num_layers is not None:
        return "its base is not the model on the disk"
    if not Path(model.path).is_dir():
        return f"its base is not there: {printable(model.path)}"
    if _trained(run) is None:
        return "no trained weights yet"
    if not run.data:
        return "its prepared data is not there"
    return ""


def _trained(run: Run) -> Path | None:
    """The directory of the last weights; None: there are none yet."""
    return next((run.path / name for name in (ADAPTER, MODEL) if (run.path / name).is_dir()), None)


def _base(run: Run, options: ReportOptions) -> ModelSource:
    return ModelSource(Path(run.found.model.path), device=options.device, variant=run.spec.model.variant)


def _draw(run: Run, options: ReportOptions, on_event: OnEvent) -> list[PreparedPrompt]:
    """Up to ``options.rows`` prompts of each split, those of ``train`` first."""
    from llamatune.data.model_compatibility import check_fingerprint
    from llamatune.formats.prepared import read_prepared_manifest
    from llamatune.inference.model_source import open_model
    from llamatune.seeds import derived_seed

    base, weights, most = _base(run, options), _trained(run), options.rows or 0
    assert weights is not None
    source = replace(base, adapter=weights) if weights.name == ADAPTER else replace(base, model=weights, variant=None)
    opened = open_model(source, on_event)
    tokenizer, data = opened.tokenizer(), run.found.data
    apart = bool(data.validation_paths)
    found = list[tuple[int, PreparedPrompt]]()
    for place, directory in enumerate((*data.train_paths, *data.validation_paths)):
        is_train = place < len(data.train_paths)
        manifest = read_prepared_manifest(directory)
        check_fingerprint(manifest.tokenizer_fingerprint, opened.tokenizer_path, False, on_event)
        for prompt in draw_prompts(PreparedRows(directory, most=most), manifest, options.seed, tokenizer):
            if prompt.split == "train" or not apart:
                found.append((place, prompt if is_train else replace(prompt, split="validation")))
    several = len(data.train_paths) > 1 or len(data.validation_paths) > 1
    prompts = list[PreparedPrompt]()
    for split in HEADINGS:
        of_split = [(place, prompt) for place, prompt in found if prompt.split == split]
        if several:
            of_split.sort(key=lambda drawn: derived_seed(options.seed, "rows", drawn[0], split, drawn[1].row))
        prompts += [prompt for _, prompt in of_split[:most]]
    return prompts


def _ask(
    run: Run, prompts: Sequence[Prompt], options: ReportOptions, on_event: OnEvent, should_stop: ShouldStop
) -> list[tuple[str | None, Generation]]:
    """The base's answer to each prompt, and the tuned one: greedy."""
    from llamatune.data.template_choice import stored_template
    from llamatune.inference.generate import generate

    sampling, base, weights = Sampling(options.max_new_tokens, temperature=0), _base(run, options), _trained(run)
    assert weights is not None

    def ask(source: ModelSource, template: str | Template | ChatTemplate | None = None) -> list[Generation]:
        return generate(source, prompts, sampling, template, on_event, should_stop).results

    if weights.name == ADAPTER:
        return [(answer.base_completion, answer) for answer in ask(replace(base, adapter=weights, compare=True))]
    tuned = ask(replace(base, model=weights, variant=None))
    manifest = find_manifest(weights)
    trained = None if manifest is None else manifest.template
    before = ask(base, "none" if trained is None else stored_template(trained, weights))
    return [(old.completion, new) for old, new in zip(before, tuned, strict=True)]
