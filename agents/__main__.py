"""`python -m agents STEP` runs one step in the foreground."""

import sys

from pipeline import signals


def main() -> int:
    """Run the step named on the command line; return the exit code."""
    signals.end_at_once()

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
