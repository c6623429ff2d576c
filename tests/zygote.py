"""An interpreter that has imported what the scripts import, and forks for each run: a script then starts at once.

conftest.start talks to it: a line of JSON on stdin starts a run, whose exit status comes in FOLDER/status.
"""

import json
import os
import runpy
import select
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import nibabel  # noqa: F401
import pydicom  # noqa: F401
import scipy.ndimage  # noqa: F401
import torch._dynamo  # noqa: F401 (every optimiser asks for it)
import torchmetrics.functional.image  # noqa: F401

import app
import evidence  # noqa: F401
import features  # noqa: F401
import predict  # noqa: F401
import train  # noqa: F401
import volumes  # noqa: F401

app.import_gradio()


def serve() -> dict:
    """Start what is asked for; returns in the process that is to do it."""
    running: dict[int, str] = {}
    while True:
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            folder = running.pop(pid)
            Path(folder, "status.new").write_text(str(os.waitstatus_to_exitcode(status)))
            os.rename(f"{folder}/status.new", f"{folder}/status")
        if not select.select([sys.stdin], [], [], 0.01)[0]:
            continue
        line = sys.stdin.buffer.raw.readline()
        if not line:
            sys.exit()
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return job
        running[pid] = job["folder"]
        Path(job["folder"], "pid").write_text(str(pid))


job = serve()
for name, fd in (("stdout", 1), ("stderr", 2)):
    os.dup2(os.open(f"{job['folder']}/{name}", os.O_WRONLY | os.O_CREAT), fd)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.clear()
os.environ.update(job["env"])
os.chdir(job["cwd"])
sys.argv = job["argv"]
runpy.run_path(job["argv"][0], run_name="__main__")
