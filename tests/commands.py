"""The environment's commands in processes of their own: forked from one that has the libraries loaded, or wholly fresh.

A fresh interpreter spends about five CPU seconds on imports. So a server that has imported what mergekit imports, but neither
mergekit nor this package, forks a child for each command. The child does what the interpreter and the command's script do:
it has the environment and the output files that it was given, runs the `sitecustomize` on PYTHONPATH, and loads the plugin
at its first `import torch`. The process is real: it can be killed, it races with others, and its exit code is its own.
Where the interpreter itself matters, a test uses `fresh`; two cases in test_without_pave.py run both ways.

Only the standard library is imported here, because the child has to begin without mergekit.
"""

import builtins
import gc
import importlib
import importlib.metadata
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

_ENVIRONMENT = dict(os.environ)  # before any test changes it
_LIBRARIES = ["torch", "transformers", "peft", "datasets", "scipy.linalg", "accelerate", "matplotlib.pyplot"]
_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(_LIBRARIES)


class Forked:
    """A command in a forked process, with what tests use of `subprocess.Popen`."""

    def __init__(self, words: list[str], env: dict[str, str]):
        with mock.patch.dict(os.environ, _ENVIRONMENT | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, clear=True):
            forkserver.ensure_running()
        self.args = words
        self._outputs = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        arguments = (words, env, *(file.name for file in self._outputs))
        self._process = _FORKING.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self.pid = self._process.pid
        self.kill = self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to stdout and stderr."""
        self.wait(timeout)
        out, err = (file.read() for file in self._outputs)
        return out, err


def start(name: str, *arguments, **env: str) -> Forked:
    """Start one of the environment's commands, or `python` with a script, -c or -m, in a forked process."""
    return Forked([name, *map(str, arguments)], os.environ | env)


def fresh(name: str, *arguments, **env: str) -> subprocess.Popen:
    """Start one of the environment's commands in a fresh interpreter."""
    words = [str(Path(sys.executable).parent / name), *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)


def finish(process: Forked | subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def command(name: str, *arguments, **env: str) -> subprocess.CompletedProcess:
    return finish(start(name, *arguments, **env))


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return command("python", "-c", code, **env)


def in_two(*words) -> list[subprocess.CompletedProcess]:
    """Run a command in two processes that know of each other, as those that `torchrun --nproc_per_node 2` starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [start(*words, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(2)]
    return [finish(process) for process in processes]


def _run(words: list[str], env: dict[str, str], out: str, err: str) -> None:
    """In the forked process."""
    gc.freeze()  # what the server has loaded is here to stay
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    if env.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
        builtins.__import__ = _loading_backends(builtins.__import__)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    if sys.modules.pop("sitecustomize", None) or importlib.util.find_spec("sitecustomize"):
        import sitecustomize  # noqa: F401
    name, *sys.argv = words
    if name != "python":
        sys.argv = words
        (script,) = importlib.metadata.entry_points(group="console_scripts", name=name)
        sys.exit(script.load()())
    option = sys.argv[0]
    if option == "-c":
        sys.argv[:2], code = ["-c"], sys.argv[1]
        exec(code, {"__name__": "__main__"})
    elif option == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(option, run_name="__main__")


def _loading_backends(load):
    """An `import` that, the first time it gets torch, lets it load the plugin, as torch does at its own end."""

    def wrapper(name, *args, **kwargs):
        module = load(name, *args, **kwargs)
        if name.partition(".")[0] == "torch":
            builtins.__import__ = load
            sys.modules["torch"]._import_device_backends()
        return module

    return wrapper
