"""An interpreter that has imported what the scripts import, and forks for each run: a script then starts at once.

conftest.Warm talks to it: a line on stdin names a folder whose file `job` says what to run (a script, or -c and code);
its pid, its output and at last its exit status come as files beside that one. It ends when nobody holds the pipe.
"""

import atexit
import json
import os
import runpy
import select
import signal
import sys
import threading
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import nibabel  # noqa: F401
import openTSNE  # noqa: F401
import pydicom  # noqa: F401
import safetensors.torch  # noqa: F401
import scipy.ndimage  # noqa: F401
import torch._dynamo  # noqa: F401 (every optimiser asks for it)
import torchmetrics.functional.image  # noqa: F401
import typeguard  # noqa: F401

import app
import evidence  # noqa: F401
import features  # noqa: F401
import predict  # noqa: F401
import train  # noqa: F401
import volumes  # noqa: F401
from config import TrainConfig, parse
from pictures import import_cv2

import_cv2()
parse(TrainConfig, [])  # tyro imports most of itself when it is called

app.import_gradio()


def serve() -> Path:
    """Start what is asked for; returns, in the process that is to do it, the folder that says what it is."""
    running: dict[int, Path] = {}
    while True:
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            folder = running.pop(pid)
            (folder / "status.new").write_text(str(os.waitstatus_to_exitcode(status)))
            os.rename(folder / "status.new", folder / "status")
        if not select.select([sys.stdin], [], [], 0.01)[0]:
            continue
        line = sys.stdin.buffer.raw.readline()
        if not line:
            sys.exit()
        folder = Path(os.fsdecode(line.rstrip(b"\n")))
        pid = os.fork()
        if pid == 0:
            return folder
        running[pid] = folder
        (folder / "pid").write_text(str(pid))


folder = serve()
job = json.loads((folder / "job").read_text())
for name, fd in (("stdout", 1), ("stderr", 2)):
    os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), fd)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.clear()
os.environ.update(job["env"])
encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8:strict").partition(":")
sys.stdout.reconfigure(encoding=encoding, errors=errors)
sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
os.chdir(job["cwd"])
script, *words = job["argv"]
sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
status: object = 0
try:
    if script == "-c":
        sys.argv = ["-c", *words[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = job["argv"]
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
except SystemExit as e:
    status = e.code or 0
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
except Exception:
    sys.excepthook(*sys.exc_info())
    status = 1
# What an interpreter does at its end, but for taking apart a gigabyte of modules, which takes two seconds.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
