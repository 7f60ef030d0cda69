"""A run on a CPU does not load PyTorch's compiler, and importing leaves the process as it was."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_place

from tandem.rl.inputs import quiet_libraries

SCRIPT = """
import gc, json, os, sys
from tandem.rl import cli
before = dict(os.environ)
sys.argv = ["rl-train", *sys.argv[1:]]
try:
    cli.main()
finally:
    # Others set variables of their own; this one is ours to put back.
    left = {k: os.environ.get(k) == before.get(k) for k in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")}
    loaded = [m for m in ("bitsandbytes", "torch._inductor.compile_fx") if m in sys.modules]
    import torch
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    print("FOUND", json.dumps({"left": left, "loaded": loaded, "collects": gc.isenabled(),
                               "compiles": "eval_frame" in compiled.__code__.co_filename}))
"""


@pytest.mark.parametrize("switch", [None, "0"])
def test_a_run_leaves_the_compiler_out_and_its_switches_alone(tmp_path: Path, switch: str | None) -> None:
    pytest.importorskip("bitsandbytes")
    config = write_place(tmp_path)
    environment = {**os.environ, "TANDEM_CACHE": str(tmp_path / "cache")}
    environment |= {"TORCHDYNAMO_DISABLE": switch} if switch else {}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "run", config, "train.max_steps=1"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[6:])
    assert all(found["left"].values())
    assert found["collects"]
    assert found["compiles"]
    # Whoever sets the switch decides for himself.
    assert found["loaded"] == ["bitsandbytes"] + ["torch._inductor.compile_fx"] * (switch == "0")


def test_warnings_of_libraries_that_concern_no_run_are_not_shown() -> None:
    quiet_libraries()
    for name in ("huggingface_hub.file_download", "kernels.hf_hub", "bitsandbytes.backends.cpu.ops"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
