"""OUTPUT.partial while a conversion owns it, and what it says of itself meanwhile.

A marker says which plan it belongs to and what it will become, so that it can be told from whatever
else may have that name; a note beside each complete shard says how to recognise it. Once all is
there, a seal takes their place: it is the last thing to go, when the directory has been OUTPUT for
a moment and what it replaced is gone.

Nothing that these files say is trusted further than the bytes of the weights bear it out.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import MOST_LISTING_BYTES, read_open
from upcycle_cli.core.text import shell_line

MARKER = ".upcycle-partial"
SEAL = ".upcycle-sealed"
CALIBRATION = ".upcycle-calibration"
SUFFIX = ".partial"
NOTE_SUFFIX = ".upcycle-note"
TEMPORARY_SUFFIX = ".writing"
STATE = (CALIBRATION, MARKER, SEAL)
"""What tells that the directory is ours comes last, so that it is the last to be removed."""


def is_note(name: str) -> bool:
    """Whether this file of an output holds what upcycle keeps for itself until it is published."""
    return name in STATE or name.endswith(NOTE_SUFFIX)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The directory of one conversion, by whichever process of it."""

    folder: Folder
    output: str
    """The name that the directory will get."""
    plan_digest: str
    files: tuple[str, ...]
    """The names of all files of the output."""
    durable: bool

    @property
    def shards(self) -> list[str]:
        """The names of its weight files."""
        return [name for name in self.files if name.endswith(".safetensors")]

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Remember that a shard is complete, so that a later run need not write it again."""
        self._save(name + NOTE_SUFFIX, {"plan_sha256": self.plan_digest} | facts)

    def noted(self, name: str) -> dict[str, Any]:
        """Return what was noted about a shard of this very plan, nothing if nothing was."""
        found = read_state(self.folder, name + NOTE_SUFFIX)
        return found if found.get("plan_sha256") == self.plan_digest else {}

    def take_over(self, *, restart: bool) -> None:
        """Keep what a run of this plan completed; UpcycleError for another's, unless `restart`."""
        marker, seal = (read_state(self.folder, name) for name in (MARKER, SEAL))
        digest = marker.get("plan_sha256", seal.get("plan_sha256"))
        if digest not in (None, self.plan_digest) and not restart:
            path = self.folder.path
            clean = ["upcycle", "clean", "--yes", str(path.with_name(self.output))]
            raise UpcycleError(
                f"{path} holds an unfinished conversion of another recipe or source.",
                f"Pass --overwrite to start over, or remove it with `{shell_line(clean)}`.",
            )
        # Before anything goes, so that whatever is left is known to be ours; and not again, since
        # there may be no room before the rest has gone.
        if marker != self._marker:
            self._save(MARKER, self._marker)
        notes = seal.get("notes") if seal.get("plan_sha256") == self.plan_digest else None
        for name, note in notes.items() if isinstance(notes, dict) else ():
            if name in self.shards and isinstance(note, dict):
                self.note(name, note)
        noted = [name for name in self.shards if self.noted(name)]
        found = [CALIBRATION] if digest == self.plan_digest else []
        self._keep_only({MARKER, *found, *noted, *(name + NOTE_SUFFIX for name in noted)})

    def seal(self, *, replaces: str | None) -> None:
        """Make all durable, and leave the output and the seal, which says what it `replaces`."""
        notes = {name: note for name in self.shards if (note := self.noted(name))}
        last = {MARKER, *(name + NOTE_SUFFIX for name in notes)}
        self._keep_only({name.split("/")[0] for name in self.files} | last)
        self._save(SEAL, self._marker | {"replaces": replaces, "notes": notes})
        for name in last:
            self.folder.remove(name)
        if self.durable:
            self.folder.sync_all()  # the weights are durable already, so this costs little

    @property
    def _marker(self) -> dict[str, str]:
        return {"plan_sha256": self.plan_digest, "output": self.output}

    def _keep_only(self, names: Collection[str]) -> None:
        for name in self.folder.names():
            if name not in names:
                self.folder.remove(name)

    def _save(self, name: str, value: object) -> None:
        self.folder.write(name, json.dumps(value).encode(), durable=self.durable)


def partial_of(output: Path) -> Path:
    """Return the directory in which OUTPUT is made."""
    return output.parent / (output.name + SUFFIX)


def read_state(folder: Folder, name: str) -> dict[str, Any]:
    """Return what a marker, seal or note says; nothing if it is missing, damaged or another's."""
    with suppress(OSError, UpcycleError, ValueError, RecursionError):
        with folder.read_own(name) as file:
            value = json.loads(read_open(file, folder.path / name, MOST_LISTING_BYTES))
        if isinstance(value, dict):
            return value
    return {}
