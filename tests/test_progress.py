"""What the progress display writes, with a clock and a stream of the test's own."""

import io

import pytest

from karploop.reporting.progress import Progress, format_duration, format_rate


class Clock:
    """Stands still until told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines as they stand after every carriage return has been obeyed."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def clock() -> Clock:
    return Clock()


def log(clock: Clock, rounds: int = 3) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(stream, rounds, clock=clock), stream


@pytest.mark.parametrize(
    "seconds, text",
    [(0.44, "0.4s"), (9.97, "10s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "rate, text", [(7.46, "7.5"), (949.7, "950"), (12345, "12.3k"), (1.2e6, "1.2M")]
)
def test_format_rate(rate, text):
    assert format_rate(rate) == text


def test_log_has_start_one_line_in_ten_seconds_and_end(clock):
    progress, stream = log(clock)
    with progress.stage(0, "train", total=25) as stage:
        for _ in range(25):
            clock.now += 1
            stage.advance(1, tokens=2000, note="loss 0.12")
    assert stream.getvalue().splitlines() == [
        "round 0 (1 of 3)  train  started",
        "round 0 (1 of 3)  train  10/25 steps  2.0k tok/s  15s left  loss 0.12",
        "round 0 (1 of 3)  train  20/25 steps  2.0k tok/s  5.0s left  loss 0.12",
        "round 0 (1 of 3)  train  25/25 steps  in 25s  2.0k tok/s  loss 0.12",
    ]


def test_a_stage_that_was_quick_is_not_announced_again(clock):
    progress, stream = log(clock)
    for index, seconds in ((0, 3), (1, 30), (2, 3)):
        with progress.stage(index, "judge", total=1):
            clock.now += seconds
    starts = [line for line in stream.getvalue().splitlines() if line.endswith("started")]
    assert starts == ["round 0 (1 of 3)  judge  started", "round 2 (3 of 3)  judge  started"]


def test_rate_and_time_left_leave_out_what_an_earlier_process_did(clock):
    progress, stream = log(clock)
    with progress.stage(0, "generate", total=100, unit="prompts", start=80) as stage:
        clock.now += 10
        stage.advance(10)
    assert "90/100 prompts  10s left" in stream.getvalue()


def test_terminal_rewrites_one_line_and_leaves_one_a_stage(clock):
    terminal = Terminal()
    progress = Progress(terminal, 2, clock=clock, columns=80)
    with progress.stage(-1, "warmup", total=2) as stage:
        clock.now += 4
        stage.advance(note="a note that makes this line longer than the last")
        assert terminal.screen() == [
            "base  warmup  1/2 steps  4.0s left  a note that makes this line longer than the"
        ]
        clock.now += 4
        stage.advance(note="short")
    assert terminal.screen() == ["base  warmup  2/2 steps  in 8.0s  short", ""]


def test_terminal_lines_never_fill_the_width(clock):
    terminal = Terminal()
    with Progress(terminal, 2, clock=clock, columns=20).stage(0, "generate", total=9) as stage:
        clock.now += 1
        stage.advance()
        live = terminal.getvalue().split("\r")
    assert max(map(len, live)) == 19


def test_terminal_is_not_redrawn_at_every_step(clock):
    terminal = Terminal()
    with Progress(terminal, 1, clock=clock, columns=80).stage(0, "train", total=1000) as stage:
        for _ in range(1000):
            clock.now += 0.001
            stage.advance()
    assert terminal.getvalue().count("\r") <= 12


def test_a_line_said_meanwhile_does_not_mix_with_the_live_one(clock):
    terminal = Terminal()
    progress = Progress(terminal, 1, clock=clock, columns=80)
    with progress.stage(0, "generate", total=3):
        progress.say("waiting")
    assert terminal.screen() == ["waiting", "round 0 (1 of 1)  generate  0/3 steps  in 0.0s", ""]


def test_time_left_of_the_run_follows_the_latest_whole_round(clock):
    progress, stream = log(clock, rounds=4)
    with progress.stage(-1, "warmup", total=1):
        clock.now += 500
    for index in range(2):  # 20 s + 40 s a round
        for name, step in (("generate", 10), ("train", 20)):
            with progress.stage(index, name, total=2) as stage:
                for _ in range(2):
                    clock.now += step
                    stage.advance()
    lines = stream.getvalue().splitlines()
    assert not any("run" in line for line in lines if not line.startswith("round 1"))
    # 10 s into the second of four rounds of 60 s.
    assert "round 1 (2 of 4)  generate  1/2 steps  10s left  run 2m50s left" in lines
    assert "round 1 (2 of 4)  train  1/2 steps  20s left  run 2m20s left" in lines


def test_a_round_taken_from_the_store_gives_no_estimate(clock):
    progress, stream = log(clock)
    progress.reused(0, "generate", "0123456789abcdef")
    with progress.stage(0, "train", total=1):
        clock.now += 30
    with progress.stage(1, "generate", total=2) as stage:
        clock.now += 15
        stage.advance()
    assert "round 0 (1 of 3)  generate  reused 0123456789ab" in stream.getvalue()
    assert "run" not in stream.getvalue()


def test_before_the_first_unit_the_earlier_round_tells_the_stage_time(clock):
    terminal = Terminal()
    progress = Progress(terminal, 2, clock=clock, columns=100)
    with progress.stage(0, "train", total=5):
        clock.now += 30
    with progress.stage(1, "train", total=5):
        assert terminal.screen()[-1].endswith("0/5 steps  30s left  run 30s left")


def test_an_error_leaves_a_line_and_passes_through(clock):
    progress, stream = log(clock)
    with pytest.raises(RuntimeError, match="device"), progress.stage(0, "train", total=9) as stage:
        clock.now += 3
        stage.advance(4)
        raise RuntimeError("device lost")
    assert stream.getvalue().endswith("round 0 (1 of 3)  train  stopped at 4/9 steps after 3.0s\n")


def test_quiet_writes_nothing(clock):
    stream = Terminal()
    progress = Progress(stream, 1, quiet=True, clock=clock)
    with progress.stage(0, "train", total=1) as stage:
        clock.now += 60
        stage.advance()
    progress.reused(0, "filter", "abc")
    progress.say("done")
    assert stream.getvalue() == ""
