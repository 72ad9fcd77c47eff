"""Run the code of one page of the documents, block by block, in one process: `python run_page.py steps.json`.

Each step is what to do, a text and where it stands. Between the outputs of two steps there is a line with `MARK`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MARK = "\x1e"  # the record separator of ASCII


def patched(text: str, difference: str) -> str:
    """A text after a difference: lines with " " and "-" in front stand in it once; those with " " and "+" take their place."""
    lines = difference.splitlines()
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in marks) for marks in (" -", " +"))
    if text.count(before) != 1:
        raise SystemExit(f"stands there {text.count(before)} times:\n{before}")
    return text.replace(before, after)


def main(steps: list[list[str]]) -> None:
    """Do the steps."""
    names = {"__name__": "__main__"}
    for kind, text, name, line in steps:
        print(f"{MARK}{name}:{line}", flush=True)
        if kind == "python":
            exec(compile("\n" * int(line) + text, name, "exec"), names)
        elif kind == "sh":
            done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", text], stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                raise SystemExit(f"{name}:{line}: status {done.returncode}")
        elif kind == "file":
            Path(name).write_text(text)
        else:
            Path(name).write_text(patched(Path(name).read_text(), text))
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    sys.argv = ["page.py"]
    sys.path[0] = ""
    main(given)
