"""`palio <verb>`: parse, call one function, map errors to exit codes. Heavy imports stand in the verbs.

Exit codes: 0 done, 1 an error named on one line, 2 bad input, 3 rule violation, 4 time limit,
5 out of memory, 6 a program of the entry died, 7 interrupted by the machine or a signal: start again,
8 not tried again in this run, 9 a model server that broke, 70 a bug of ours (with its traceback).
"""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

import click

from palio.cli import entry, organizer, research, step  # noqa: F401 (each puts its verbs into the group)
from palio.cli.group import palio
from palio.errors import PalioError

__all__ = ["main", "palio"]

BUG_EXIT_CODE = 70


def main() -> NoReturn:
    """Entry point. A user's mistake ends in one line, never in a traceback."""
    try:
        sys.exit(palio(standalone_mode=False) or 0)  # click returns an Exit's code, verbs return None
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except PalioError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        print("error: this is a bug in Palio, not in your input; please report it", file=sys.stderr)
        sys.exit(BUG_EXIT_CODE)
