"""New processes, for what cannot be measured twice in one: imports, first uses, memory peaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def said_by(code: str, **variables: str) -> str:
    """Run code in a new process and return the first line that it prints.

    Parameters
    ----------
    code : str
        Python code; this project can be imported in it.
    **variables : str
        Environment variables, in addition to those of this process.

    Raises
    ------
    RuntimeError
        If the process ends with an error or prints nothing.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
    # In its own process group, which Ctrl-C does not reach: else it would print a traceback.
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
        except KeyboardInterrupt:
            process.kill()
            raise
    if process.returncode != 0 or not said:
        raise RuntimeError(f"a new process failed with {process.returncode}, running {code}")
    return said
