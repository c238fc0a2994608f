"""A PostgreSQL server of our own, behind a Unix socket in a temporary folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Server:
    """Can be stopped and started again, and can cut its clients' connections."""

    def __init__(self, folder: Path) -> None:
        import pgserver

        self.running: Any = pgserver.get_server(folder)
        self.url: str = self.running.get_uri().replace("postgresql://", "postgresql+psycopg2://")

    def stop(self) -> None:
        from pgserver._commands import pg_ctl

        pg_ctl(["-w", "-m", "fast", "stop"], pgdata=self.running.pgdata, user=self.running.system_user)

    def start(self) -> None:
        self.running.ensure_postgres_running()

    def cut_connections(self) -> None:
        self.running.psql(
            "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'client backend' and pid <> "
            "pg_backend_pid();"
        )


@contextmanager
def postgresql() -> Iterator[Server]:
    # Not pytest's folder: a socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # pgserver warns where a login shell has not set it.
        patch.setenv("XDG_RUNTIME_DIR", folder)
        server = Server(Path(folder, "data"))
        yield server
        server.running.cleanup()
