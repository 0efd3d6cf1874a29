"""Convert a repo, verify, push, download into an empty cache, verify again, compare every byte.

    python tests/hub_roundtrip.py DENSE [--recipe E8G1T2] [--xet]

DENSE is a directory, which a fake Hub on loopback serves as a repo. Each step is a command in its
own process. With `--xet`, hf_xet transfers to its own local store, and the script prints how much
that store keeps of E equal experts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hub.server import Hub

from upcycle_cli.publish.card import card_for_repo

SOURCE, RESULT = "acme/dense", "acme/moe"


def main() -> None:
    """Run the steps; exit with 1 when one fails or a file differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("--recipe", default="E8G1T2")
    parser.add_argument("--xet", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upcycle-roundtrip-") as name:
        scratch = Path(name)
        store = scratch / "xet" if arguments.xet else None
        if store is not None:
            store.mkdir()
        with Hub(scratch / "hub", xet=store) as hub:
            hub.store.upload(SOURCE, arguments.dense)
            round_trip(hub, scratch, arguments.recipe)
        if store is not None:
            kept = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
            pushed = sum(path.stat().st_size for path in (scratch / "moe").glob("*.safetensors"))
            print(f"Xet keeps {kept:,} of {pushed:,} bytes ({kept / pushed:.1%})")


def round_trip(hub: Hub, scratch: Path, recipe: str) -> None:
    """Run every step; SystemExit says which one failed."""

    def upcycle(*command: str, home: str) -> Any:  # noqa: ANN401
        print("$ upcycle", *command, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "upcycle_cli", *command, "--json"],
            cwd=scratch,
            env=hub.environment(scratch / home),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"exit code {done.returncode}\n{done.stdout}")
        return json.loads(done.stdout)

    few = ("--tokens", "256")
    upcycle("inspect", SOURCE, "--recipe", recipe, home="home")
    upcycle("convert", SOURCE, "moe", "--recipe", recipe, home="home")
    upcycle("verify", SOURCE, "moe", *few, home="home")
    commit = upcycle("push", "moe", RESULT, home="home")["commit"]
    if upcycle("push", "moe", RESULT, home="home")["status"] != "already there":
        sys.exit("the second push changed something")
    upcycle("verify", SOURCE, RESULT, "--moe-revision", commit, *few, home="empty")
    snapshots = scratch / "empty" / "hub" / f"models--{RESULT.replace('/', '--')}" / "snapshots"
    for path in sorted((scratch / "moe").rglob("*")):
        data = path.read_bytes()
        if path.name == "README.md":
            data = card_for_repo(data.decode(), RESULT).encode()
        if data != (snapshots / commit / path.relative_to(scratch / "moe")).read_bytes():
            sys.exit(f"{path.name} differs after the round trip")
    print("All files came back bit for bit.")


if __name__ == "__main__":
    main()
