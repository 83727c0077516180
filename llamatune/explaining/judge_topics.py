"""Topics of ``judge``: its requirements, and rows and texts that it cannot measure."""

from __future__ import annotations

from llamatune.explaining.topics import topic

JUDGE_TOPICS = (
    topic(
        "a requirement that judge cannot check",
        2,
        r"is no requirement|is no number$|is no number:|no metric is called|^… needs …$|needs --gsm8k|would be called|"
        r"computes in one process",
        "--require names figures that this call measures, each with a relation and a number; every file of --general "
        "and --choices gives figures under its own name.",
        "error: no metric is called 'loss': --require: there are task_loss, task_perplexity",
        "Write METRIC<NUMBER; docs/judge.md lists the metrics.",
    ),
    topic(
        "a plot of the rank of a run that has none",
        2,
        r"no rank to draw",
        "--plot draws how much of its rank an adapter uses. A run without lora trains every parameter, and its weights "
        "have no rank that could be compared with one.",
        "error: the run trained no low-rank update, so there is no rank to draw: --plot",
        "Leave --plot out; `llamatune extract-lora --plot` decomposes the change of a model that was trained whole.",
    ),
    topic(
        "rows and texts that judge cannot measure",
        3,
        r"there is room for|nothing precedes the choice|^no text$|no text:|too little text|a NUL character at|"
        r"overlap needs",
        "A choice must have a token and fit into the context, a text some words, and the overlap needs the rows that "
        "the run was trained on.",
        "error: too little text: no token has one before it: notes.txt: give a text of some hundred words",
        "Leave the row out, give another text, or run judge where the run was started.",
    ),
    topic(
        "a requirement that does not hold",
        6,
        r"--require does not hold",
        "A figure of `judge` is not as --require wants it. The result was printed nevertheless.",
        "error: --require does not hold: task_loss is 1.31, not < 1.2: runs/alpaca",
        "Look at the table: train longer, with another rate, or ask for less.",
    ),
)
