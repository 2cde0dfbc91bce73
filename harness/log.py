"""log.jsonl, a line for each tenth step: locked by the run that writes it, whole on any disk."""
import errno
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from tasks.locks import lock_file


def no_link(name, flags):
    """An opener that follows no link, on systems that can tell."""
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class Log:
    """log.jsonl, this process's until it ends; rows beyond `step` are cut off. path None: a log of nothing.
    rows: all there is, a list of dicts. ValueError: another process is training into it."""

    def __init__(self, path, step):
        self.rows, self.waiting = [], []
        self.file = path and open(path, "a+b", buffering=0, opener=no_link)
        if not path:
            return
        try:
            lock_file(self.file)
        except BlockingIOError:
            raise ValueError(f"another process is training in {path.parent}") from None
        except OSError:                                 # some network file systems lock nothing
            pass
        self.file.seek(0)
        end = 0
        for line in self.file.read().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:                          # a killed run's last line may be half a one
                break
            if not line.endswith(b"\n") or not isinstance(row, dict) or not row.get("step", math.inf) <= step:
                break
            self.rows.append(row)
            end += len(line)
        self.file.truncate(end)

    def write(self, row):
        """Append a row. On a full disk it waits for the next one, and for `sync`: a log alone ends no run."""
        if self.file:
            self.rows.append(row)
            self.waiting.append(row)
            try:
                self.flush()
            except OSError as error:
                print(f"\nwarning: {error}; the log will be written later", file=sys.stderr)

    def flush(self):
        end = self.file.seek(0, os.SEEK_END)
        text = "".join(json.dumps(row) + "\n" for row in self.waiting).encode()
        try:
            if self.file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        except OSError:
            self.file.truncate(end)                     # all of it or nothing
            raise
        self.waiting.clear()

    def sync(self):
        """Have every row on the disk: OSError."""
        self.flush()
        os.fsync(self.file.fileno())


def read_log(path):
    """The rows of a log.jsonl, which a run may be writing: lines that are not whole are left out. OSError.
    Not for the run's own process, whose lock would end."""
    rows = []
    for line in Path(path).read_bytes().splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and all(isinstance(value, int | float) and math.isfinite(value)
                                             for word, value in row.items() if word != "nonfinite"):
                rows += [row] if "step" in row else []
    return rows
