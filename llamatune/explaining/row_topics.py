"""Topics of exit code 3: rows of data files, prompts and prepared directories."""

from __future__ import annotations

from llamatune.explaining.topics import topic

ROW_TOPICS = (
    topic(
        "a row without a field, or with a wrong one",
        3,
        r"no field|the row has|usable rows|a field that is not text|for the template|has no token|not text,|no "
        r"'#### number'|without the field|the answer has",
        "Rows are read by their fields, as instruction, input and output of Alpaca. A row lacks one that its format "
        "needs, or it is no text.",
        "error: rows.jsonl:17: no field 'output'; the row has 'instruction', 'input'",
        "Mend the row; name other columns with --map, as instruction=query,output=response; or allow some bad "
        "rows with --skip-bad-rows N, which writes them to refused.jsonl.",
    ),
    topic(
        "a file that is not rows",
        3,
        r"not a file of rows|the last whole row|save_to_disk|data set|names no (data files|splits)|"
        r"carriage returns|header|compressed twice|rows of no known format|not valid JSON|not UTF-8|NUL byte|"
        r"bytes of text|more than … bytes|more than [\d,]+ bytes|the file is |a line of JSON|the column … is|"
        r"text is not UTF-8|a line (of|is)|ends within a message|is there twice|not a line with prompt|"
        r"lone surrogate|…… \(…\)|cannot be read as|is (encrypted|broken|cut)|decompress",
        "The bytes are not those of a supported file: JSON, JSON Lines, CSV, TSV, Parquet, Arrow or text, perhaps "
        "compressed.",
        "error: compressed twice: rows.json.gz.gz: decompress it once",
        "Look at the file's first bytes; convert it to JSON Lines in UTF-8.",
    ),
    topic(
        "standard input, pipes and files that change",
        3,
        r"is a terminal|a pipe|was changed while|cannot read",
        "Rows may come through a pipe, and files must stay as they are while they are read.",
        "error: a row file was changed while it was read: run the same command again",
        "Give a file, or a pipe that some program writes to; run the command when the file is finished.",
    ),
    topic(
        "a prepared directory that cannot be used",
        3,
        r"prepared directory|splits\.|the file holds|no such directory|written by another version|"
        r"prepare-data wrote|its tensors do not fit|row offsets|loss_mask|no target token|same directory is given|"
        r"no training row|no (validation|train) rows|no rows|(train|validation)\.safetensors|prepared (with|for)|"
        r"other settings",
        "What prepare-data wrote is incomplete, altered, of another version, or no prepared directory at all.",
        "error: not a prepared directory: prepared/alpaca: give one that prepare-data wrote",
        "Run prepare-data again into a new directory; `llamatune verify DIR` says which file was altered.",
    ),
    topic(
        "rows or prompts that do not fit the model",
        3,
        r"max-seq-length|tokens the model knows|embedding rows|and up to .* new ones|token that the tokenizer|"
        r"token ids?|a prompt of|rows have no prompt|no row has a prompt|rows with a prompt|"
        r"rows that are not asked|no prompts|chat template (leaves|refuses)|user's turn|the tokenizer of|"
        r"rows were prepared",
        "Rows or prompts are longer than the model or --max-seq-length allows, hold tokens that the model has not, or "
        "give a chat template what it does not take.",
        "error: rows.jsonl:4: the row has 900 tokens, more than --max-seq-length 512",
        "Raise --max-seq-length, let rows be truncated (--overlong truncate), or prepare them with this model's "
        "tokenizer.",
    ),
)
