"""Progress without a terminal: a line every ten seconds, nothing for short work."""

from __future__ import annotations

import pytest

from upcycle_cli.cli import progress


@pytest.mark.parametrize(
    ("seconds", "step", "share", "lines"),
    [
        (9, "writing", (1, 2), []),
        (25, "downloading", None, ["downloading: 10 s", "downloading: 20 s"]),
        (25, "", None, []),
        (
            15,
            "checking outputs",
            (1, 4),
            ["checking outputs: 1 of 4 layers, 10 s (about 30 s left)"],
        ),
    ],
)
def test_long_work_prints_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    step: str,
    share: tuple[int, int] | None,
    lines: list[str],
) -> None:
    now = 0.0

    class Ended:
        def wait(self, pause: float) -> bool:
            nonlocal now
            now += pause
            return now > seconds

    monkeypatch.setattr("time.monotonic", lambda: now)
    display = progress.Display()
    if step:
        display.begins(step)
    if share:
        display.checked(*share, "layers")
    progress.print_lines(display, Ended())  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == lines
