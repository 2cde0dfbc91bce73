"""Commands inside the process of the tests: no seconds to import, and what they call can be watched."""
import contextlib
import io
import os
import runpy
import signal
import sys
from types import SimpleNamespace

import torch
from conftest import ROOT

import kernels


def here(script, *words, status=0):
    """Run a script of the repository to its end: what it printed, `stdout` and `stderr`, and its `status`,
    which may be any if that is None. What it sets in this process is set back."""
    environment = dict(os.environ)
    before = sys.argv, sys.excepthook, torch.get_float32_matmul_precision(), kernels.choice
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stdout, stderr, ended = io.StringIO(), io.StringIO(), 0
    sys.argv = [script, *map(str, words)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        ended = end.code or 0
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.excepthook, precision, kernels.choice = before
        torch.set_float32_matmul_precision(precision)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    done = SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue(), status=ended)
    assert status is None or ended == status, done
    return done
