"""`python -m agents STEP` runs one step in the foreground."""

import os
import signal
import sys


def main() -> int:
    """Run the step named on the command line; return the exit code."""
    # Importing a step with its torch takes seconds, and the first process of a container gets no signal that it
    # does not handle: a pod that is stopped while it starts would stay until it is killed. Nothing was begun yet.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))

    from pipeline import garbage

    garbage.pause()
    from agents.app import STEPS, run
    from pipeline import settings
    from pipeline.errors import EXIT_CONFIGURATION, ConfigurationError

    if len(sys.argv) != 2:
        print(f"usage: python -m agents {{{','.join(STEPS)}}}", file=sys.stderr)
        return 2
    try:
        return run(sys.argv[1], settings.load())
    except ConfigurationError as error:
        print(f"millrace: {error.message}", file=sys.stderr)
        return EXIT_CONFIGURATION


if __name__ == "__main__":
    code = main()
    from agents.app import leave

    leave(code)
