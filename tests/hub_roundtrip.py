"""From the Hub to the Hub and back: convert a repo, verify, push, download, verify again.

    python tests/hub_roundtrip.py DENSE [--recipe E8G1T2] [--xet]

DENSE is a directory; a Hub on loopback serves it as a repo, and takes the result. Every step is the
command line in a process of its own. The last one has an empty cache, and what it downloads must be
what was pushed, byte by byte. `--xet` lets hf_xet transfer, against its own local store, and prints
what that store keeps of E equal experts.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
from pathlib import Path

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
                kept = _size(store)
                pushed = sum(file.stat().st_size for file in _weights(scratch / "moe"))
                print(f"Xet keeps {kept:,} of {pushed:,} bytes ({kept / pushed:.1%})")


def round_trip(hub: Hub, scratch: Path, recipe: str) -> None:
    """Do every step against `hub`; SystemExit says which one failed."""

    def upcycle(*command: str, home: str) -> dict[str, object]:
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
        found: dict[str, object] = json.loads(done.stdout)
        return found

    upcycle("inspect", SOURCE, "--recipe", recipe, home="home")
    upcycle("convert", SOURCE, "moe", "--recipe", recipe, home="home")
    few = ("--tokens", "256")  # what is shown here is that every file comes back
    upcycle("verify", SOURCE, "moe", *few, home="home")
    pushed = upcycle("push", "moe", RESULT, home="home")
    commit = str(pushed["commit"])
    again = upcycle("push", "moe", RESULT, home="home")
    if again["status"] != "already there" or again["commit"] != commit:
        sys.exit(f"the second push did something: {again}")
    upcycle("verify", SOURCE, RESULT, "--moe-revision", commit, *few, home="empty")
    cache = scratch / "empty" / "hub" / f"models--{RESULT.replace('/', '--')}" / "snapshots"
    compare(scratch / "moe", cache / commit)


def compare(pushed: Path, downloaded: Path) -> None:
    """Say that two directories hold the same files; SystemExit when they do not."""
    names = sorted(path.relative_to(pushed).as_posix() for path in pushed.rglob("*"))
    names.remove("README.md")  # on the Hub it names its repo
    if (
        card_for_repo((pushed / "README.md").read_text(), RESULT)
        != (downloaded / "README.md").read_text()
    ):
        sys.exit("README.md is not the card of this repo")
    _, differing, missing = filecmp.cmpfiles(pushed, downloaded, names, shallow=False)
    if differing or missing:
        sys.exit(f"differing: {differing}, missing: {missing}")
    nbytes = sum((pushed / name).stat().st_size for name in names)
    print(f"{len(names)} files, {nbytes:,} bytes, came back bit-identical.")


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
