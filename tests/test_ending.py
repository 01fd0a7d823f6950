"""An error in one of several processes ends all of them soon, and is printed once."""

import os
import re
import subprocess
import time

import pytest
from launch import ROOT, train_command

from runtime import process_group

# The recipe, but rank 2 fails in its second step; and to leave the group waits for the others, as with NCCL.
FAULTY = """
import os, sys, time
import torch.distributed as dist
import train_coco
from runtime import run_command

def fail(run, step, parts, losses, grad_norm):
    if step == 1 and os.environ["RANK"] == "2":
        print("FAILED AT", time.time(), flush=True)
        raise {error}
    return update(run, step, parts, losses, grad_norm)

update, train_coco.update = train_coco.update, fail
dist.destroy_process_group = lambda: time.sleep(100)
run_command(train_coco.main, train_coco.parse(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "error, tracebacks, status",
    [
        ("RuntimeError('the reason')", 1, 1),
        pytest.param("ValueError('the reason')", 0, 2, marks=pytest.mark.slow),
        pytest.param("SystemExit(143)", 0, 143, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_of_four_processes(tiny_coco, tmp_path, error, tracebacks, status):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(error=error))
    line = train_command(tiny_coco, tmp_path / "run", "--steps 4 --workers 0", processes=4)
    line[line.index(ROOT / "recipes" / "train_coco.py")] = script
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'recipes'}"}
    result = subprocess.run(line, capture_output=True, text=True, timeout=90, env=environment)
    ended, printed = time.time(), result.stdout + result.stderr
    assert result.returncode != 0
    assert ended - float(re.search(r"FAILED AT (\S+)", printed)[1]) < 10
    assert printed.count(": the reason") == (status != 143), printed
    assert re.search(rf"exitcode\s*: {status}\b", printed), printed
    # torchrun's own traceback comes last
    assert printed.count("Traceback (most recent call last)") == tracebacks + 1, printed


def test_one_gpu_for_several_processes(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--device cuda:0 is one GPU for 4 processes; give --device cuda"):
        with process_group("cuda:0"):
            pass
