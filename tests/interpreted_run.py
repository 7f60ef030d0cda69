"""A test file's Triton kernels by Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys


def outcomes_interpreted(file: str, keyword: str = "interpreted") -> dict[str, int]:
    """Run the tests of `file` that a keyword picks in a fresh process; counts by outcome, as in `{"passed": 12}`.

    Raises:
        AssertionError: a test failed.
    """
    command = [sys.executable, "-m", "pytest", file, "-k", keyword, "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # PyTorch's compiler has no part in it, and takes seconds to import, which bitsandbytes asks for.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
