"""In place of the images of others: real servers from wheels, with as much of the images' own scripts as is asked of them.

PostgreSQL and Valkey are themselves, of other versions. Instead of MinIO there is moto, which keeps objects in memory and
lets everybody in; of `mc` and `valkey-cli` what the compose file calls. Run as a script this is those programs:
`standins.py NAME ARGUMENT ...`.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

__all__ = ("PROGRAMS", "programs")

CONFIGURATION = """
listen_addresses = '*'
unix_socket_directories = '/tmp'
"""
"""What the image's own sample has besides the usual."""


def docker_entrypoint(arguments: Sequence[str]) -> int:
    """PostgreSQL's: make the cluster once, with the user, the password and the database that are asked for."""
    data = Path(os.environ["PGDATA"])
    user, database = os.environ["POSTGRES_USER"], os.environ["POSTGRES_DB"]
    if not (data / "PG_VERSION").exists():
        password = Path("/tmp/password")  # noqa: S108 -- of a container that is alone
        password.write_text(os.environ["POSTGRES_PASSWORD"])
        how = ["--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--no-sync"]
        asked = ["-D", str(data), f"--username={user}", f"--pwfile={password}"]
        subprocess.run(["initdb", *how, *asked], check=True)
        password.unlink()
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all scram-sha-256\n")
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(CONFIGURATION)
        made = f'CREATE DATABASE "{database}"\n'
        alone = ["postgres", "--single", "-D", str(data), "postgres"]
        subprocess.run(alone, input=made, text=True, check=True)
    os.execvp(arguments[0], list(arguments))  # noqa: S606


def valkey_cli(arguments: Sequence[str]) -> int:
    """`valkey-cli ping`, with the password of the environment."""
    if arguments != ["ping"]:
        raise SystemExit(f"valkey-cli {arguments}: only ping")
    with socket.create_connection(("127.0.0.1", 6379), timeout=2) as server:
        server.sendall(f"AUTH {os.environ['REDISCLI_AUTH']}\r\nPING\r\n".encode())
        said = b""
        while said.count(b"\r\n") < 2 and (piece := server.recv(1024)):
            said += piece
    sys.stdout.write(said.decode())
    return 0 if said == b"+OK\r\n+PONG\r\n" else 1


def minio(arguments: Sequence[str]) -> int:
    """`minio server /data`."""
    if arguments != ["server", "/data"]:
        raise SystemExit(f"minio {arguments}: only `server /data`")
    os.execvp("python", ["python", "-m", "moto.server", "-H", "0.0.0.0", "-p", "9000"])  # noqa: S104, S606


def mc(arguments: Sequence[str]) -> int:
    """`mc mb --ignore-existing ALIAS/BUCKET`."""
    *how, place = arguments
    alias, _, bucket = place.partition("/")
    if how != ["mb", "--ignore-existing"] or not re.fullmatch(r"[a-z0-9-]+", bucket):
        raise SystemExit(f"mc {arguments}: only mb")
    server = urlsplit(os.environ[f"MC_HOST_{alias}"])
    signed = f"AWS4-HMAC-SHA256 Credential={server.username}/20260101/us-east-1/s3/aws4_request"
    address = f"{server.scheme}://{server.hostname}:{server.port}/{bucket}"
    asked = Request(address, headers={"authorization": signed}, method="PUT")  # noqa: S310
    with urlopen(asked, timeout=10) as answer:  # noqa: S310
        return 0 if answer.status == 200 else 1


PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "docker-entrypoint.sh": docker_entrypoint,
    "valkey-cli": valkey_cli,
    "minio": minio,
    "mc": mc,
}


def programs(folder: Path, python: Path) -> Path:
    """A folder of them, to be found by their names."""
    if folder.exists():
        return folder
    folder.mkdir()
    (folder / "python").symlink_to(python)
    for name in PROGRAMS:
        (folder / name).write_text(f'#!/bin/sh\nexec python /standins.py {name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


if __name__ == "__main__":
    sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))
