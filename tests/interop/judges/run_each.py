"""Runs a script once for each list of arguments in a JSON file, in one process: importing torch takes seconds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

script, arguments = sys.argv[1:]
sys.path.insert(0, str(Path(script).parent))
for words in json.loads(Path(arguments).read_text()):
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
