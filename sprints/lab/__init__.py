"""The lab: what more than one lesson needs.

Lessons import from here before they import torch, because this file makes two things end with one clear line
and exit status 2, never a traceback: bad input, and Ctrl-C at any moment, the slow imports included.

Derived in: –
"""

import os
import sys


class BadInput(Exception):
    """Something the user gave cannot be used; the message is the one line that they see."""


def _last_word(kind, error, traceback) -> None:
    program = os.path.basename(sys.argv[0])
    if issubclass(kind, BadInput):
        print(f"{program}: {error}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print(f"{program}: stopped by Ctrl-C; nothing was written", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):  # `… | head`: nobody is reading any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        sys.__excepthook__(kind, error, traceback)
        return
    sys.exit(2)


sys.excepthook = _last_word
