"""A copy of a model whose tensors are computed, for programs that cannot compute them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CONFIG_NAME, WEIGHTS_NAME
from upcycle_cli.plan.output import OutputTensor, Role, Shard
from upcycle_cli.write.evaluate import evaluate_together
from upcycle_cli.write.file_layout import lay_out
from upcycle_cli.write.record import json_bytes


@contextmanager
def plain_copy(source: Checkpoint) -> Iterator[Path]:
    """Yield the directory of a model with plain weights; a copy exists while the context lasts."""
    if not source.made:
        yield source.path
        return
    tensors = (OutputTensor.of(name, source.tensor(name), Role.COPIED) for name in source.tensors)
    layout = lay_out(Shard(WEIGHTS_NAME, (*tensors,)))
    with TemporaryDirectory(prefix="upcycle-source-") as folder, source.reader() as reader:
        path = Path(folder)
        (path / CONFIG_NAME).write_bytes(json_bytes(source.config))
        for each in source.companions:
            (path / each.name).parent.mkdir(exist_ok=True)
            (path / each.name).write_bytes(source.storage.companion(each))
        with (path / WEIGHTS_NAME).open("wb") as file:
            file.write(layout.header)
            for part in layout.parts:
                for _, piece in evaluate_together([part.expr], reader.mapped):
                    file.write(piece)
        yield path
