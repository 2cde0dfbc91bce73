"""Runs the scripts in forks of a process that has imported what they need: in a second, not in eight.

As `python tests/forks.py` it takes commands from stdin, one in JSON a line; class Forks is the other end.
"""
import atexit
import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Forks:
    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                                    "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        assert self.ask(warm=True) == "ready"

    def ask(self, **command):
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, script, *words, out, file_limit=None, cwd=ROOT, **environment):
        """The pid of a new process that runs the script with words, and prints to `out`.stdout, .stderr.

        file_limit: no file may be larger, in bytes, as under a quota. environment: what torchrun sets.
        """
        return self.ask(argv=[str(ROOT / script), *map(str, words)], output=str(out), file_limit=file_limit,
                        cwd=str(cwd), environment=environment)

    def start_together(self, processes, script, *words, out):
        """The pids of processes that are to each other as those of one torchrun; by rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        same = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "one"}
        return [self.start(script, *words, out=f"{out}.{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **same)
                for rank in range(processes)]

    def wait(self, pid):
        """The process's exit status, −N if signal N killed it."""
        return self.ask(wait=pid)

    def run(self, script, *words, out, status=0, **more):
        """Run to the end: (stdout, stderr)."""
        found = self.wait(self.start(script, *words, out=out, **more))
        stdout, stderr = (Path(f"{out}.{name}").read_text(errors="replace") for name in ("stdout", "stderr"))
        assert found == status, (found, stdout[-1000:], stderr[-3000:])
        return stdout, stderr

    def close(self):
        self.server.stdin.close()
        self.server.wait()


def serve():
    import matplotlib.figure  # noqa: F401
    import torch

    import eval_zeroshot  # noqa: F401
    import harness.training  # noqa: F401
    import losses  # noqa: F401
    # and nothing is computed here: forks of a busy OpenMP hang
    torch.set_num_threads(1)
    # or each fork would look through all of it, and copy it
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            answer = os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])
        elif "argv" in command:
            answer = os.fork()
            if not answer:
                return command
        else:
            answer = "ready"
        print(json.dumps(answer), file=answers, flush=True)


def set_again_what_comes_from_the_environment():
    """RANK and the like, which every module has imported from harness.processes already."""
    found = runpy.run_path(str(ROOT / "harness" / "processes.py"))
    for module in [*sys.modules.values()]:
        if (getattr(module, "__file__", None) or "").startswith(f"{ROOT}/"):
            for name in {"RANK", "WORLD", "LOCAL", "RESTARTS", "LAUNCH"} & vars(module).keys():
                setattr(module, name, found[name])


def run(command):
    """Be the process that a command describes, to its end."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{command['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if command["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_limit"], resource.RLIM_INFINITY))
    for number in (signal.SIGINT, signal.SIGTERM):      # a background job of a shell ignores the first
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    # one that hangs fails its test, and holds up no others
    signal.alarm(300)
    sys.argv = command["argv"]
    os.chdir(command["cwd"])
    if command["environment"]:
        os.environ |= command["environment"]
        set_again_what_comes_from_the_environment()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    # the end as Python's own, but without taking all that is imported apart, which takes a second
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


if __name__ == "__main__":
    command = serve()
    if command:
        run(command)
