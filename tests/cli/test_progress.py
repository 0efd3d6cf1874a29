"""Progress without a terminal: a line every ten seconds, nothing for short work."""

from __future__ import annotations

import pytest

from upcycle_cli.cli import progress


class Clock:
    """A clock, and the event of a command that runs for `seconds` of it."""

    def __init__(self, seconds: float) -> None:
        self.now, self.end = 0.0, seconds

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > self.end


@pytest.mark.parametrize(
    ("seconds", "step", "share", "lines"),
    [
        (9, "writing", (1, 2), []),
        (25, "downloading", None, ["downloading: 10 s", "downloading: 20 s"]),
        (25, "", None, []),
        (15, "checking outputs", (1, 4), ["1 of 4 layers, 10 s (about 30 s left)"]),
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
    clock = Clock(seconds)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    display = progress.Display()
    if step:
        display.begins(step)
    if share:
        display.checked(*share, "layers")
    progress.print_lines(display, clock)  # type: ignore[arg-type]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(lines)
    assert all(line.endswith(words) for line, words in zip(printed, lines, strict=True))
