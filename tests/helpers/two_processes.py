"""Commands of ``ppow`` in two processes of one launch: starting them takes longer than what they do here."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, os, sys
from pathlib import Path
from accelerate.state import PartialState
from ppow.training.cli import main
PartialState.destroy_process_group = lambda self, group=None: self.wait_for_everyone()  # the next command uses it
folder = Path(sys.argv[1])
for i, command in enumerate(json.loads((folder / "commands.json").read_text())):
    (folder / f"status-{i}-{os.environ['RANK']}").write_text(str(main(command)))
"""


def run_in_two_processes(folder, commands, script=SCRIPT) -> tuple[list[list[str]], str]:
    """Run the commands one after the other: -> the exit status of each in each process, and standard error."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(script)
    (folder / "commands.json").write_text(json.dumps(commands))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, folder / "script.py", folder], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [[(folder / f"status-{i}-{rank}").read_text() for rank in (0, 1)] for i in range(len(commands))]
    return found, done.stderr
