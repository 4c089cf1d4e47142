"""The lab: what more than one lesson needs.

Lessons import from here before they import torch, because this file makes two things end with one clear line
and exit status 2, never a traceback: bad input, and Ctrl-C at any moment, the slow imports included.

Derived in: –
"""

import multiprocessing
import os
import signal
import sys
import time

STARTED = time.perf_counter()


class BadInput(Exception):
    """Something the user gave cannot be used; the message is the one line that they see."""


def _last_word(kind, error, traceback) -> None:
    """What an uncaught exception comes to."""
    if issubclass(kind, BadInput):
        _say(error)
    elif issubclass(kind, KeyboardInterrupt):
        _say("stopped by Ctrl-C; nothing was written")
    elif issubclass(kind, BrokenPipeError):  # `… | head`: nobody is reading any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        sys.__excepthook__(kind, error, traceback)
        return
    sys.exit(2)


def _stop_importing(*_) -> None:
    """Ctrl-C during the imports, some of which would turn a KeyboardInterrupt into an error of their own."""
    _say("stopped by Ctrl-C; nothing was written")
    os._exit(2)


def _say(what: object) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {what}", file=sys.stderr, flush=True)


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler would talk of itself on stderr
sys.excepthook = _last_word
_lesson = os.path.basename(sys.argv[0])[:1].isdigit()
if _lesson and multiprocessing.current_process().name == "MainProcess":  # no worker of a lesson, also spawned
    signal.signal(signal.SIGINT, _stop_importing)  # until lab.lesson.run
