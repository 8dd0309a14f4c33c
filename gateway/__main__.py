"""`python -m gateway`: the gateway as a process of its own.

Exit codes: 0 after SIGTERM or SIGINT, 78 for a wrong setting (one line on stderr, no traceback).
"""

import sys

from pipeline import signals


def main() -> int:
    """Serve until a signal; return the exit code."""
    signals.end_at_once()

    import asyncio

    from gateway.server import serve
    from pipeline import logs, settings
    from pipeline.errors import EXIT_CONFIGURATION, ConfigurationError

    try:
        options = settings.load()
        logs.configure(options, part="gateway")
        asyncio.run(serve(options))
    except ConfigurationError as error:
        print(f"gateway: {error.message}", file=sys.stderr)
        return EXIT_CONFIGURATION
    return 0


if __name__ == "__main__":
    sys.exit(main())
