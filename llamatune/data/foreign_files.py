"""Files that hold no rows that could be read, by their first bytes: what each is, and how to get rows out of it."""

from __future__ import annotations

import codecs
import re

_AS_CSV = "save the sheet as CSV in UTF-8"
_AS_TEXT = "save it as plain text in UTF-8"
_AS_LINES = "write its rows as JSON Lines"
_UNPACK = "unpack it, and give the files in it"
_NO_ROWS = "give a file of rows"
_TEXTS = (
    (b"%PDF-", "a PDF document", "write its text: pdftotext FILE rows.txt"),
    (b"version https://git-lfs", "a git-lfs pointer", "fetch the file itself: git lfs pull"),
    (b"{\\rtf", "an RTF document", _AS_TEXT),
    (b"<?xml", "XML", "convert it to JSON Lines"),
)
_BINARIES = (
    (
        b"SQLite format 3\0",
        "an SQLite database",
        "write a table: sqlite3 -csv -header FILE 'select * from T' > rows.csv",
    ),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office file of an old kind (.xls, .doc)", f"{_AS_CSV}, or as text"),
    (b"BZh", "a file compressed by bzip2", "decompress it: bunzip2 FILE"),
    (b"\xfd7zXZ\0", "a file compressed by xz", "decompress it: xz -d FILE"),
    (b"\x04\x22\x4d\x18", "a file compressed by lz4", "decompress it: lz4 -d FILE"),
    (b"\x1f\x9d", "a file compressed by compress", "decompress it: gzip -d FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x89PNG", "an image (PNG)", _NO_ROWS),
    (b"\xff\xd8\xff", "an image (JPEG)", _NO_ROWS),
    (b"GIF8", "an image (GIF)", _NO_ROWS),
    (b"RIFF", "an image, sound or video (RIFF)", _NO_ROWS),
    (b"\x93NUMPY", "a NumPy array", _AS_LINES),
    (b"\x89HDF\r\n", "an HDF5 file", _AS_LINES),
    (b"GGUF", "a model in GGUF", _NO_ROWS),
    (b"\x7fELF", "a program", _NO_ROWS),
    (b"Obj\x01", "an Avro file", _AS_LINES),
    (b"ORC", "an ORC file", _AS_LINES),
    (b"FEA1", "a Feather file of version 1", "write it as Parquet"),
    (b"PARE", "an encrypted Parquet file", "decrypt it"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_HTML = re.compile(rb"\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_IN_ZIP = (
    (b"xl/", "a spreadsheet (.xlsx)", _AS_CSV),
    (b"opendocument.spreadsheet", "a spreadsheet (.ods)", _AS_CSV),
    (b"opendocument", "an OpenDocument file", _AS_TEXT),
    (b"word/", "a Word document (.docx)", _AS_TEXT),
    (b"data.pkl", "a PyTorch file (it holds pickles, which can run code)", _AS_LINES),
    (b".npy", "an archive of NumPy arrays (.npz)", _AS_LINES),
)
_ZIP_SUFFIXES = {".xlsx": _IN_ZIP[0], ".xlsm": _IN_ZIP[0], ".ods": _IN_ZIP[1], ".odt": _IN_ZIP[2], ".docx": _IN_ZIP[3]}


def foreign_kind(head: bytes, suffix: str) -> tuple[str, str] | None:
    """What a file is that begins with ``head``, some kilobytes, and what to do; None if it may hold rows."""
    if _HTML.match(head):
        return "an HTML page", "fetch the file itself (the address of the download, not of the page that shows it)"
    known = _TEXTS if _is_text(head) else _TEXTS + _BINARIES
    for beginning, *answer in known:
        if head.startswith(beginning):
            what, todo = answer
            return what, todo
    return None if known is _TEXTS else _by_structure(head, suffix)


def _by_structure(head: bytes, suffix: str) -> tuple[str, str] | None:
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        found = next((kind for kind in _IN_ZIP if kind[0] in head), None) or _ZIP_SUFFIXES.get(suffix)
        return found[1:] if found else ("a zip archive", f"{_UNPACK}: unzip FILE")
    if _PICKLE.match(head):
        return "a Python pickle (it can run code, so it is not opened)", _AS_LINES
    if head[257:262] == b"ustar":
        return "a tar archive", f"{_UNPACK}: tar -xf FILE"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 27:
        return "a safetensors file", f"{_NO_ROWS}, not a model's weights"
    return None


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return "\0" not in text
