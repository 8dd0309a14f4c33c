"""Become another program that dies with its parent; run as a script, never imported by Millrace.

Usage: python -I -S launch.py PARENT_PID DEATH_SIGNAL USER_ID GROUP_ID CAPABILITY -- PATH [ARGUMENT...]

USER_ID, GROUP_ID and CAPABILITY are -1 where they do not apply. A script of its own rather than `preexec_fn`,
because running Python between fork and exec in a process with threads may deadlock, and because it leaves
`subprocess` free to use vfork. Only the standard library, and little of it: it adds 20 ms to a start. Nothing of
Millrace is on its path (-I), which is why `agents/devices.py`, whose children exec nothing, asks for a parent's
death in a line of its own.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h, as all of the PR_ names
PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
SECBIT_NO_SETUID_FIXUP = 1 << 2  # linux/securebits.h
LINUX_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h

EXIT_NOT_STARTED = 127  # what a shell answers for a program it cannot run


def keep_only(libc: ctypes.CDLL, capability: int) -> None:
    """Drop every capability but one, and hand that one on through exec."""
    low, high = (1 << capability, 0) if capability < 32 else (0, 1 << (capability - 32))
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    # Two 32-bit halves of (effective, permitted, inheritable): capget(2).
    sets = (ctypes.c_uint32 * 6)(low, low, low, high, high, high)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    if libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_CAP_AMBIENT)")


def main(arguments: list[str]) -> None:
    """Apply the wishes of the command line to this process and exec the program."""
    parent, death_signal, user, group, capability = (int(argument) for argument in arguments[:5])
    program = arguments[6:]
    libc = ctypes.CDLL(None, use_errno=True)
    if capability >= 0 and libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) != 0:
        # Without this bit access(2) ignores the capability of a process that is not root, and PostgreSQL
        # asks access(2) whether it may run itself.
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECUREBITS)")
    if user >= 0:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
    if capability >= 0:
        keep_only(libc, capability)
    # After the change of user, which clears it: prctl(2).
    libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:
        # The parent died before the line above, so nobody is left to be told.
        os.kill(os.getpid(), signal.SIGKILL)
    # Not execvp: it imports modules that the new user may not be allowed to read.
    os.execv(program[0], program)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        print(f"cannot start {sys.argv[7:8]}: {error}", file=sys.stderr)
        sys.exit(EXIT_NOT_STARTED)
