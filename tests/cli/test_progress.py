"""Progress without a terminal: a line every ten seconds, nothing for short work."""

from __future__ import annotations

import pytest  # noqa: TC002 - pytest reads the annotations

from upcycle_cli.cli import progress


def test_long_work_prints_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = end = 0.0

    class Ended:
        def wait(self, pause: float) -> bool:
            nonlocal now
            now += pause
            return now > end

    monkeypatch.setattr("time.monotonic", lambda: now)
    for seconds, step, done, lines in (
        (9, "writing", 1, []),
        (25, "downloading", 0, ["downloading: 10 s", "downloading: 20 s"]),
        (25, "", 0, []),
        (15, "checking outputs", 0, ["checking outputs: loading, 10 s"]),
        (15, "checking outputs", 1, ["checking outputs: 1 of 4 layers, 10 s (about 30 s left)"]),
    ):
        now, end, display = 0.0, seconds, progress.Display()
        if step:
            display.begins(step)
        if done:
            display.checked(done, 4, "layers")
        progress.print_lines(display, Ended())  # type: ignore[arg-type]
        assert capsys.readouterr().err.splitlines() == lines
