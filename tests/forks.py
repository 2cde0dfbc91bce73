"""Runs the project's scripts in forks of a process that has imported everything they need: a second each in place of eight.

As `python tests/forks.py` it takes commands from stdin, one in JSON a line; class Forks is the other end.
"""
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Forks:
    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0",
                                    "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=environment, cwd=ROOT)
        assert self.ask(warm=True) == "ready"

    def ask(self, **command):
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, script, *words, out, file_limit=None, cwd=ROOT):
        """The pid of a new process that runs the script with these words; its output goes to `out`.stdout and .stderr."""
        return self.ask(argv=[str(ROOT / script), *map(str, words)], output=str(out), file_limit=file_limit, cwd=str(cwd))

    def wait(self, pid):
        """The process's exit status, −N if signal N killed it."""
        return self.ask(wait=pid)

    def run(self, script, *words, out, status=0, file_limit=None):
        """Run to the end: (stdout, stderr)."""
        found = self.wait(self.start(script, *words, out=out, file_limit=file_limit))
        stdout, stderr = (Path(f"{out}.{name}").read_text() for name in ("stdout", "stderr"))
        assert found == status, (found, stdout[-1000:], stderr[-3000:])
        return stdout, stderr

    def close(self):
        self.server.stdin.close()
        self.server.wait()


def serve():
    import torch

    import checkpoints  # noqa: F401
    import eval_zeroshot  # noqa: F401
    import report  # noqa: F401
    torch.set_num_threads(1)                            # and nothing is computed here: forks of a busy OpenMP hang
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


if __name__ == "__main__":
    command = serve()
    if command:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{command['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if command["file_limit"]:                       # a quota: no file may be larger, in bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_limit"], resource.RLIM_INFINITY))
        for number in (signal.SIGINT, signal.SIGTERM):  # a background job of a shell ignores the first
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.argv = command["argv"]
        os.chdir(command["cwd"])
        runpy.run_path(sys.argv[0], run_name="__main__")
