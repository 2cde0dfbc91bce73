"""Files and folders that one process at a time writes to, where the system can lock them: not on Windows."""
import os

try:
    import fcntl
except ImportError:
    fcntl = None


def lock_file(file):
    """Keep other processes out of an open file until it is closed. BlockingIOError: one is in; OSError: no
    locks on this disk."""
    if fcntl is not None:       # not flock, which workers inherit: they may end later
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_folder(path):
    """Keep others out of a folder until the descriptor returned is closed, here and in the workers that
    inherit it. BlockingIOError: one is in."""
    if fcntl is None:           # Windows opens no folders either
        return os.open(os.devnull, os.O_RDONLY)
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise
    except OSError:             # some network file systems lock no folders
        pass
    return folder
