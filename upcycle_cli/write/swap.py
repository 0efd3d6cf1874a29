"""The last steps of a conversion: OUTPUT.partial becomes OUTPUT, and what was there before goes.

The names change in one step where the system has it, and in two where it has not. The seal in the
new directory says what it replaces, and stays until that is gone. So whenever the machine stops,
the old output is as it was, wherever it is, and the next run knows what to do with it.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack
from dataclasses import dataclass

from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.platform import exchange, lock
from upcycle_cli.write.ownership import record_digest, remove_all, take_inventory
from upcycle_cli.write.staging import SEAL, SUFFIX, Workspace, read_state

ASIDE = ".replaced"
"""Where the old output is between two renames."""
_IN_THE_WAY = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


def publish(parent: Folder, workspace: Workspace, *, overwrite: bool) -> str | None:
    """Give a complete directory its name; return what is left of the old one and cannot be removed.

    Raises UpcycleError, or OSError, when that cannot be done; what was there is then as it was.
    """
    new, name = workspace.folder, workspace.output
    with ExitStack() as opened:
        old = parent.inner(name, opened) if overwrite else None
        if old is not None and not old.names():
            old = None
        replaces = None if old is None else record_digest(old)
        mode = new.usual_mode()
        workspace.seal(replaces=replaces)
        # Once more, and not before the disk had everything: the conversion may have taken hours.
        if old is not None and take_inventory(old).record_digest != replaces:
            raise moved(old)
        new.set_mode(mode)
        try:
            _give_name(parent, new, name, old)
        except BaseException:
            if parent.holds(name + SUFFIX, new):
                new.make_private()
            raise
        if workspace.durable:
            parent.sync()
        return _finish(parent, new, name, replaces, durable=workspace.durable)


def moved(folder: Folder) -> UpcycleError:
    """Return what to raise when a directory's name has come to stand for something else."""
    return UpcycleError(
        f"{folder.path} was moved or replaced meanwhile; nothing was published.",
        "See what is there now, and who else can write beside it.",
    )


def _give_name(parent: Folder, new: Folder, name: str, old: Folder | None) -> None:
    if not parent.holds(name + SUFFIX, new):
        raise moved(new)
    if old is None:
        _rename(parent, name + SUFFIX, name)  # onto a free name or an empty directory
    elif not exchange(parent.descriptor, name + SUFFIX, name):
        _rename_both(parent, name, old)
    elif not parent.holds(name + SUFFIX, old):
        exchange(parent.descriptor, name + SUFFIX, name)
        raise moved(old)
    if not parent.holds(name, new):
        raise moved(new)


def _rename_both(parent: Folder, name: str, old: Folder) -> None:
    try:
        _rename(parent, name, name + ASIDE)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise UpcycleError(
            f"{old.path} cannot be renamed, and so not be replaced: it is in a lower layer of an "
            "overlay file system.",
            "Move or remove it yourself.",
        ) from error
    if not parent.holds(name + ASIDE, old):
        parent.rename(name + ASIDE, name)
        raise moved(old)
    try:
        parent.rename(name + SUFFIX, name)
    except BaseException:
        parent.rename(name + ASIDE, name)
        raise


def _rename(parent: Folder, old: str, new: str) -> None:
    try:
        parent.rename(old, new)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        raise UpcycleError(
            f"{parent.path / new} is in the way: it was not there before.", "Move it elsewhere."
        ) from error


def _finish(
    parent: Folder, new: Folder, name: str, replaces: str | None, *, durable: bool
) -> str | None:
    """Remove what was replaced, and then the seal; return what is left."""
    left = None
    for place in (name + SUFFIX, name + ASIDE) if replaces else ():
        try:
            _remove_replaced(parent, place, replaces)
        except (OSError, UpcycleError) as error:
            reason = error.message if isinstance(error, UpcycleError) else error.strerror
            left = f"{parent.path / place} is what {name} was before, and is left: {reason}"
    new.remove(SEAL)
    if durable:
        new.sync()
    return left


def _remove_replaced(parent: Folder, place: str, replaces: str | None) -> None:
    with ExitStack() as opened:
        old = parent.inner(place, opened)
        if old is None:
            return
        if record_digest(old) == replaces:
            remove_all(old, take_inventory(old))
        elif old.names():
            return  # something else
        parent.remove_empty(place)


# What a kill leaves of this -----------------------------------------------------------------------


@dataclass(frozen=True)
class Interrupted:
    """A replacement that has not come to its end."""

    parent: Folder
    name: str
    new: Folder
    """The directory with the seal, which has its name already unless `aside`."""
    replaces: str | None
    old: str | None
    """Where what it replaces is now, if it is not where it was."""
    aside: bool
    """Whether there is nothing under the name: the old output has left it, the new has not come."""

    def end(self) -> str | None:
        """Finish it, or undo it where there is no OUTPUT; say so. UpcycleError when it is busy."""
        if not lock(self.new.descriptor):
            raise busy(self.new)
        if not self.aside:
            return _finish(self.parent, self.new, self.name, self.replaces, durable=True)
        assert self.old is not None
        self.parent.rename(self.old, self.name)
        return (
            f"{self.parent.path / self.name} had been set aside as {self.old} by a run that was "
            "killed, and is back."
        )


def find_interrupted(parent: Folder, name: str, opened: ExitStack) -> Interrupted | None:
    """Return the replacement of a directory that was cut short, if one was."""
    for place in (name, name + SUFFIX):
        new = parent.inner(place, opened)
        seal = {} if new is None else read_state(new, SEAL)
        if new is None or seal.get("output") != name or not new.is_mine(private=False):
            continue
        replaces = seal["replaces"] if isinstance(seal.get("replaces"), str) else None
        aside = place != name
        places = (name + ASIDE,) if aside else (name + SUFFIX, name + ASIDE)
        old = next((at for at in places if _is(parent, at, replaces)), None)
        if not aside or (old is not None and parent.status(name) is None):
            return Interrupted(parent, name, new, replaces, old, aside)
    return None


def busy(folder: Folder) -> UpcycleError:
    """Return what to raise when another process holds the lock of a directory."""
    return UpcycleError(
        f"another upcycle process is writing {folder.path}.", "Wait for it, or stop it."
    )


def _is(parent: Folder, place: str, digest: str | None) -> bool:
    with ExitStack() as opened:
        folder = parent.inner(place, opened)
        return folder is not None and digest is not None and record_digest(folder) == digest
