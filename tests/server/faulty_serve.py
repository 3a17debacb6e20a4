"""Runs ``memplus`` with an engine whose steps fail if a prompt has a certain token."""

import sys

from engine.process import run_engine
from server import served_model
from server.cli.main import main
from server.engine_entry import build_engine

# a special token, which no text has
FAULTY_ID = 258


def faulty_engine(connection, settings) -> None:
    """Entry function of an engine process."""
    engine = build_engine(settings)
    launch = engine._executor.launch

    def launch_or_fail(batch):
        if FAULTY_ID in batch.ids_T.tolist():
            raise ArithmeticError("a fault of the test")
        return launch(batch)

    engine._executor.launch = launch_or_fail
    run_engine(engine, connection)


if __name__ == "__main__":
    served_model.ENGINE_ENTRY = "tests.server.faulty_serve:faulty_engine"
    sys.exit(main())
