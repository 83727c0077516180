"""Scores multiple-choice files by lm-evaluation-harness and its own task files: the question and the answer are JSON.

The question: ``model``, ``adapter`` (or null) and ``files``, by name, in the shapes that ``judge --choices`` reads. The
answer: of each file a line a row, in the file's order: ``loglikelihoods``, ``acc`` and, where the task has it,
``acc_norm``.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

TASKS = Path(lm_eval.__file__).parent / "tasks"
HELLASWAG, ARC = TASKS / "hellaswag" / "hellaswag.yaml", TASKS / "arc" / "arc_easy.yaml"
MMLU = TASKS / "mmlu" / "default"
OF_DATA = ("tag", "training_split", "validation_split", "fewshot_split", "fewshot_config", "dataset_name",
           "should_decontaminate", "doc_to_decontamination_query")  # fmt: skip
"""Of a task file, what says where the harness fetches its rows; everything that asks and scores stays."""


def tasks_of(name: str, rows: list[dict], folder: Path) -> dict[str, list[int]]:
    """Write the harness's task files over our rows; the places of each task's rows in the file."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(f"{name}__{row['subject']}" if "subject" in row else name, []).append(place)
    for task, places in groups.items():
        own = [{**rows[place], **({"label": str(rows[place]["label"])} if "label" in rows[place] else {})}
               for place in places]  # fmt: skip
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        kind = HELLASWAG if "endings" in rows[0] else ARC if "answerKey" in rows[0] else MMLU / "_default_template_yaml"
        text = kind.read_text().replace("!function ", "FUNCTION ")
        settings = {key: value for key, value in yaml.safe_load(text).items() if key not in OF_DATA}
        if "subject" in rows[0]:
            of_subject = MMLU / f"mmlu_{task.partition('__')[2]}.yaml"
            settings["description"] = yaml.safe_load(of_subject.read_text())["description"]
        settings |= {"task": task, "dataset_path": "json", "test_split": "test",
                     "dataset_kwargs": {"data_files": {"test": str(folder / f"{task}.jsonl")}}}  # fmt: skip
        (folder / f"{task}.yaml").write_text(
            yaml.safe_dump(settings, sort_keys=False).replace("FUNCTION ", "!function ")
        )
    return groups


def main() -> None:
    question, answer = map(Path, sys.argv[1:])
    asked = json.loads(question.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        folder, groups = Path(scratch), {}
        shutil.copy(HELLASWAG.parent / "utils.py", folder)
        for name, file in asked["files"].items():
            groups[name] = tasks_of(name, [json.loads(line) for line in Path(file).read_text().splitlines()], folder)
        model = f"pretrained={asked['model']},dtype=float32"
        model += f",peft={asked['adapter']}" if asked["adapter"] else ""
        result = lm_eval.simple_evaluate(
            model="hf", model_args=model, tasks=[task for found in groups.values() for task in found], num_fewshot=0,
            batch_size=8, device="cpu", log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=scratch, include_defaults=False),
        )  # fmt: skip
    lines = {}
    for name, found in groups.items():
        lines[name] = [None] * sum(map(len, found.values()))
        for task, places in found.items():
            for sample in result["samples"][task]:
                line = {key: sample[key] for key in ("acc", "acc_norm") if key in sample}
                line["loglikelihoods"] = [float(reply[0][0]) for reply in sample["resps"]]
                lines[name][places[sample["doc_id"]]] = line
    answer.write_text(json.dumps(lines))


main()
