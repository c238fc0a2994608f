"""`python -m benchmarks.peers install aimet brevitas`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.peers.environments import FOLDER, PEERS, TORCH, PeerError, install, is_installed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=f"Virtual environments of peers, in {FOLDER}."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("install", help="make them with pip")
    command.add_argument("names", nargs="+", choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    command.add_argument(
        "--torch", default=TORCH, metavar="REQUIREMENT", help=f"installed first and then held (default: {TORCH})"
    )
    options = parser.parse_args(arguments)
    for name in dict.fromkeys(options.names):
        if is_installed(name):
            sys.stdout.write(f"{name} is installed in {FOLDER / name}\n")
            continue
        try:
            install(name, options.torch)
        except PeerError as error:
            raise SystemExit(str(error)) from error
        sys.stdout.write(f"{name} is now installed in {FOLDER / name}\n")


if __name__ == "__main__":
    main()
