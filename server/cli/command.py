"""The command ``memplus``: runs ``main``; before and after it, Ctrl+C ends the process silently."""

import signal


def command() -> int:
    """Run the command line of this process and return its exit status."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        # the imports take half a second, in which Ctrl+C would print a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from server.cli.main import main

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    finally:
        if is_default:
            # the end of the interpreter takes a while too
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    raise SystemExit(command())
