"""cli: exit codes, JSON, help, and the commands that address a coordinator, run as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click
import pytest

import pcshare
from pcshare import cli, errors, runtime
from pcshare.cli import options
from pcshare.cli.stop import command as stop_command
from pcshare.coordinator.options import PAGE_SIZE_AUTO
from pcshare.core import lib
from pcshare.status import read_status
from support import suspended, wait_until

PAGE = 4096
TIMEOUT_S = 60.0
PROGRAM = (sys.executable, "-m", "pcshare")

pytestmark = pytest.mark.usefixtures("runtime_dir")


def pcshare_run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, **options)


def last_json(output: str) -> dict[str, Any]:
    told = json.loads(output.splitlines()[-1])
    assert isinstance(told, dict)
    return told


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(64 * PAGE))
    return path


@pytest.fixture
def lazy(source: Path) -> Iterator[pcshare.Coordinator]:
    with pcshare.Coordinator(blocks={"data": str(source)}, stream="lazy") as coordinator:
        yield coordinator


# -- the frame


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_with_examples_and_json(name: str) -> None:
    done = pcshare_run(name, "--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert "--json" in done.stdout


def test_help_and_version_import_neither_the_core_nor_rich() -> None:
    script = (
        "import sys; from pcshare.cli import main; codes = main(['--help']), main(['--version'])\n"
        "heavy = [m for m in ('rich', 'pcshare.core', 'pcshare.status', 'numpy', 'psutil') if m in sys.modules]\n"
        "sys.exit(f'{codes} {heavy}' if heavy or codes != (0, 0) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("status", "--no-such-option"),
        ("status", "a/b"),
        ("status", "--socket", "/run/pcshare/other.sock", "weights"),
        ("stream", "--socket", "/run/pcshare/other.sock", "weights", "pause"),
        ("resume", "--socket", "/run/pcshare/other.sock", "weights"),
        ("stop", "--socket", "/run/pcshare/other.sock", "weights"),
        ("stream", "weights", "rate"),
        ("stream", "weights", "pause", "200M"),
        ("stream", "weights", "rate", "fast"),
        ("stop", "weights", "--timeout", "soon"),
        ("run", "big.npy"),
        ("run", "big.npy", "--stream", "slow", "--", "true"),
        ("run", "big.npy", "--page-size", "8K", "--", "true"),
    ],
)
def test_wrong_usage_exits_2_and_says_how_in_json_too(arguments: tuple[str, ...]) -> None:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    done = pcshare_run(*arguments[:end], "--json", *arguments[end:])
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert last_json(done.stdout)["error"]


def test_json_after_the_dashes_belongs_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--no-such-option", "--", "true", "--json"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PcshareError("broken", errno=5, hint="mend it"), 1),
        (errors.UsageError("broken", hint="mend it"), 2),
        (errors.HostError("broken", hint="mend it"), 3),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_codes_a_message_and_a_json_object(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    @options.json_option
    def failing(as_json: bool) -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: failing)
    assert cli.main(["status", "--json"]) == code
    said = capsys.readouterr()
    told = last_json(said.out)
    assert set(told) == {"error", "hint", "errno"}
    assert told["errno"] == getattr(error, "errno", None)
    if isinstance(error, errors.PcshareError):
        assert (told["error"], told["hint"]) == ("broken", "mend it")
        assert "broken" in said.err
        assert "mend it" in said.err


def test_reader_that_goes_away_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run([*PROGRAM, "status", "--json"], stdout=stdout, stderr=subprocess.PIPE, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert done.stderr == b""


def test_runtime_directory_that_is_not_safe_exits_3_with_the_cure(tmp_path: Path) -> None:
    directory = tmp_path / "pcshare"
    directory.mkdir()
    directory.chmod(0o777)
    done = pcshare_run("resume", "weights", "--json", env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)})
    assert done.returncode == 3
    assert "XDG_RUNTIME_DIR" in last_json(done.stdout)["hint"]


# -- values of options


def test_stream_modes_are_those_of_the_status_segment() -> None:
    assert options.STREAM_MODES == {
        "eager": lib.STATUS_STREAM_EAGER,
        "lazy": lib.STATUS_STREAM_LAZY,
        "rate": lib.STATUS_STREAM_RATE,
        "paused": lib.STATUS_STREAM_PAUSED,
    }


def test_page_size_is_one_that_is_offered_or_left_to_the_coordinator() -> None:
    assert [options.parse_page_size(text) for text in ("4K", "2M", "2097152", "auto")] == [4096, 2 << 20, 2 << 20, 0]
    assert options.PAGE_SIZE_AUTO == PAGE_SIZE_AUTO
    with pytest.raises(errors.UsageError, match="page size '8K' is not offered"):
        options.parse_page_size("8K")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("eager", (0, 0)), ("lazy", (1, 0)), ("paused", (3, 0)), ("200M", (2, 200 << 20)), ("4096", (2, 4096))],
)
def test_stream_is_a_word_or_a_rate(text: str, parsed: tuple[int, int]) -> None:
    assert options.parse_stream(text) == parsed


@pytest.mark.parametrize("text", ["", "fast", "0", "-5M", "rate"])
def test_what_is_no_way_to_stream_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match="not a way to stream"):
        options.parse_stream(text)


# -- status, stream, resume, stop


def test_status_of_nobody_exits_1() -> None:
    done = pcshare_run("status", "nobody-of-that-name", "--json")
    assert done.returncode == 1
    assert "nobody-of-that-name" in last_json(done.stdout)["error"]


@pytest.mark.parametrize("order", [("resume",), ("stop",), ("stream", "pause")])
def test_orders_to_nobody_exit_1(order: tuple[str, ...]) -> None:
    done = pcshare_run(order[0], "nobody-of-that-name", *order[1:])
    assert done.returncode == 1
    assert "nobody-of-that-name" in done.stderr


def test_status_json_has_the_promised_fields(lazy: pcshare.Coordinator) -> None:
    with lazy.attach("data") as block:
        block.ensure(slice(0, 3 * PAGE))
        done = pcshare_run("status", lazy.name, "--json")
    assert done.returncode == 0
    told = last_json(done.stdout)
    assert len(done.stdout.splitlines()) == 1
    assert {"name", "pid", "state", "reason", "blocks", "helpers"} <= set(told)
    assert told["pid"] == lazy.pid
    (data,) = told["blocks"]
    assert data["idstr"] == "data"
    assert data["received_pages"] == 3
    assert data["page_count"] == 64
    (helper,) = told["helpers"]
    assert helper["pid"] == os.getpid()
    assert set(helper["blocktime_us"]) == {"p50", "p99", "max"}


def test_status_for_people_draws_the_pages(lazy: pcshare.Coordinator) -> None:
    done = pcshare_run("status", lazy.name)
    assert done.returncode == 0
    assert "." * 64 in done.stdout
    assert "not received" in done.stdout


def test_status_by_socket_is_that_of_its_name(lazy: pcshare.Coordinator) -> None:
    assert lazy.socket is not None
    done = pcshare_run("status", "--socket", lazy.socket, "--json")
    assert last_json(done.stdout)["name"] == lazy.name


def test_status_by_socket_on_which_nobody_listens_is_none(lazy: pcshare.Coordinator, tmp_path: Path) -> None:
    """Although there is a coordinator of that name, elsewhere."""
    path = tmp_path / f"{lazy.name}.sock"
    done = pcshare_run("status", "--socket", str(path))
    assert done.returncode == 1
    assert f"nobody listens on {path}" in done.stderr


def test_status_lists_all(lazy: pcshare.Coordinator) -> None:
    assert lazy.name in pcshare_run("status").stdout
    listed = last_json(pcshare_run("status", "--json").stdout)["coordinators"]
    assert lazy.name in [told["name"] for told in listed]


def test_status_answers_while_the_coordinator_is_stopped(lazy: pcshare.Coordinator) -> None:
    assert lazy.pid is not None
    with suspended(lazy.pid):
        done = pcshare_run("status", lazy.name, "--json")
        assert done.returncode == 0
        assert last_json(done.stdout)["stopped"] is True


def test_status_of_a_dead_coordinator_exits_1_and_still_tells(source: Path) -> None:
    with pcshare.Coordinator(blocks={"data": str(source)}, keeper=False) as coordinator:
        assert coordinator.pid is not None
        os.kill(coordinator.pid, signal.SIGKILL)
        wait_until(lambda: not read_status(coordinator.name).alive, "dead")
        done = pcshare_run("status", coordinator.name, "--json")
        assert done.returncode == 1
        told = last_json(done.stdout)
        assert told["alive"] is False
        assert "dead" in told["error"]
        assert told["blocks"][0]["idstr"] == "data"
        done = pcshare_run("stop", coordinator.name)
        assert done.returncode == 1
        assert "dead" in done.stderr


def test_stream_is_steered_at_run_time(lazy: pcshare.Coordinator) -> None:
    assert read_status(lazy.name).stream == "lazy"
    assert pcshare_run("stream", lazy.name, "rate", "400K", "--json").returncode == 0
    report = read_status(lazy.name)
    assert (report.stream, report.stream_rate) == ("rate", 400 << 10)
    assert pcshare_run("stream", lazy.name, "pause").returncode == 0
    assert read_status(lazy.name).stream == "paused"
    assert pcshare_run("stream", lazy.name, "resume").returncode == 0
    assert read_status(lazy.name).stream == "rate"
    assert pcshare_run("stream", lazy.name, "eager").returncode == 0
    wait_until(lambda: read_status(lazy.name).state == "END", "complete")
    assert read_status(lazy.name).blocks[0].received_pages == 64


def test_resume_asks_a_failed_source_again(source: Path, tmp_path: Path) -> None:
    switch = tmp_path / "fails"
    switch.touch()
    blocks = {"data": f"{source}#error=EIO@{switch}"}
    with pcshare.Coordinator(blocks=blocks, stream="eager", on_source_loss="pause") as coordinator:
        wait_until(lambda: read_status(coordinator.name).state == "PAUSED", "paused")
        assert read_status(coordinator.name).blocks[0].reason
        switch.unlink()
        assert pcshare_run("resume", coordinator.name, "--json").returncode == 0
        wait_until(lambda: read_status(coordinator.name).state == "END", "complete")
        with coordinator.attach("data") as block:
            assert bytes(block) == source.read_bytes()


def test_stop_waits_until_it_is_gone_and_names_who_was_attached(source: Path) -> None:
    coordinator = pcshare.Coordinator(blocks={"data": str(source)}, stream="lazy").start()
    try:
        pid, socket_path = coordinator.pid, coordinator.socket
        assert pid is not None
        assert socket_path is not None
        with coordinator.attach("data"):
            done = pcshare_run("stop", coordinator.name, "--json")
        assert done.returncode == 0
        assert last_json(done.stdout) == {
            "name": coordinator.name,
            "pid": pid,
            "stopped": True,
            "helpers": [os.getpid()],
        }
        assert coordinator.name not in runtime.names()
        assert not Path(socket_path).exists()
    finally:
        coordinator.stop()


def test_stop_of_a_stopped_process_gives_up_after_its_time(lazy: pcshare.Coordinator) -> None:
    assert lazy.pid is not None
    with suspended(lazy.pid):
        done = pcshare_run("stop", lazy.name, "--timeout", "200ms")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_stop_has_a_time_limit_by_default() -> None:
    (timeout,) = [parameter for parameter in stop_command.params if parameter.name == "timeout"]
    assert timeout.default == "20s"


# -- run


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)]
)
def test_run_passes_the_exit_code_on(source: Path, script: str, code: int) -> None:
    assert pcshare_run("run", str(source), "--", "sh", "-c", script).returncode == code


def test_run_gives_the_command_a_coordinator_and_takes_it_away(source: Path) -> None:
    script = "import os, pcshare\nwith pcshare.attach() as block: print(os.environ['PCSHARE_NAME'], sum(bytes(block)))"
    done = pcshare_run("run", f"data={source}", "--", sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    name, total = done.stdout.split()
    assert int(total) == sum(source.read_bytes())
    assert name not in runtime.names()
    assert runtime.find_socket(name) is None


def test_run_takes_every_page_size_that_is_offered(source: Path) -> None:
    script = "import pcshare; b = pcshare.attach(); print(b.progress.page_count)"
    for size in ("4K", "auto"):
        done = pcshare_run("run", str(source), "--page-size", size, "--", sys.executable, "-c", script)
        assert (done.returncode, done.stdout) == (0, "64\n"), done.stderr


def test_run_json_keeps_stdout_for_its_object(source: Path) -> None:
    script = (
        "import os, time, pcshare; from pcshare.status import read_status\n"
        "b = pcshare.attach(); print(bytes(memoryview(b)[:1]))\n"
        "while not read_status(os.environ['PCSHARE_NAME']).blocks[0].demand_pages: time.sleep(0.01)\n"
        "b.close(); print('hello')"
    )
    done = pcshare_run("run", str(source), "--json", "--stream", "lazy", "--", sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert "hello" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    told = last_json(done.stdout)
    assert told["exit_code"] == 0
    assert told["total_s"] > 0
    assert told["blocks"][0]["demand_pages"] >= 1
    assert told["helpers"]["joined"] == 1
    assert told["helpers"]["left"] == 1


@pytest.mark.parametrize(("mode", "code"), [(None, 127), (0o644, 126)])
def test_run_says_why_a_command_cannot_start(source: Path, tmp_path: Path, mode: int | None, code: int) -> None:
    job = tmp_path / "job"
    if mode is not None:
        job.write_text("#!/bin/sh\n")
        job.chmod(mode)
    done = pcshare_run("run", str(source), "--json", "--", str(job))
    assert done.returncode == code
    assert str(job) in done.stderr
    assert str(job) in last_json(done.stdout)["error"]


def test_run_of_a_missing_source_exits_1_and_runs_nothing(tmp_path: Path) -> None:
    done = pcshare_run("run", str(tmp_path / "missing"), "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 1
    assert "missing" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_run_leaves_the_command_the_signals_a_shell_would(source: Path) -> None:
    def masks(*prefix: str) -> list[int]:
        """Blocked and ignored; 32 and 33 are the C library's own affair."""
        command = [*prefix, "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        return [int(line.split()[1], 16) & (1 << signal.SIGSYS) - 1 for line in done.stdout.splitlines()]

    assert masks(*PROGRAM, "run", str(source), "--") == masks("env")


TELLS_SIGNALS = """
import os, signal, sys
got = []
def say(*words):  # not print: a handler may come in the middle of it
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
def told(number, frame):
    got.append(number)
    say("got", signal.Signals(number).name)
    if number == signal.SIGTERM:
        say("all", [signal.Signals(n).name for n in got])
        sys.exit(5)
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, told)
say("ready")
while True:
    signal.pause()
"""


def read_until(stream: IO[str] | None, word: str) -> str:
    """Lines up to the one with the word."""
    assert stream is not None
    seen: list[str] = []
    for line in stream:
        seen.append(line)
        if word in line:
            return line
    raise AssertionError(f"{word!r} never came: {seen}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_run_passes_signals_on(source: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*PROGRAM, "run", str(source), "--", sys.executable, "-c", TELLS_SIGNALS], stdout=subprocess.PIPE, text=True
    ) as process:
        read_until(process.stdout, "ready")
        process.send_signal(number)
        read_until(process.stdout, f"got {number.name}")
        process.send_signal(signal.SIGTERM)
        assert read_until(process.stdout, "all") == f"all ['{number.name}', 'SIGTERM']\n"
        assert process.wait(TIMEOUT_S) == 5


# Main waits and is not interrupted: so it is when a signal comes between Python's last look and the wait.
SIGNAL_INTERRUPTS_NOTHING = """
import os, signal, sys, threading, time
from pathlib import Path
from pcshare.cli import main
def send():
    while "epoll" not in Path(f"/proc/self/task/{os.getpid()}/wchan").read_text():
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=send, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["coordinator --name=deaf --no-keeper --stream=lazy", "serve --socket=./deaf.sock"])
def test_signal_that_does_not_interrupt_the_wait_ends_who_serves(source: Path, tmp_path: Path, command: str) -> None:
    words = [sys.executable, "-c", SIGNAL_INTERRUPTS_NOTHING, *command.split(), str(source)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        modes = termios.tcgetattr(theirs)
        modes[3] |= termios.NOFLSH  # else ^C also throws away what the program has written at that very moment
        termios.tcsetattr(theirs, termios.TCSANOW, modes)
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments], preexec_fn=lambda: os.login_tty(theirs), env=environment, close_fds=False
        )
        os.close(theirs)
        self.seen = ""

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def read_until(self, word: str) -> None:
        while word not in self.seen:
            try:
                self.seen += os.read(self._ours, 1 << 16).decode(errors="replace")
            except OSError:  # the program has ended
                pytest.fail(f"{word!r} never came, but {self.seen!r}")

    def read_all(self) -> str:
        try:
            while chunk := os.read(self._ours, 1 << 16):
                self.seen += chunk.decode(errors="replace")
        except OSError:  # EIO: nobody has the other side any more
            pass
        return self.seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_interrupt_of_the_terminal_reaches_the_command_once_and_the_coordinator_never(
    source: Path, terminal: Callable[..., Terminal]
) -> None:
    name = f"tty-{os.getpid()}"
    screen = terminal("run", "--name", name, str(source), "--", sys.executable, "-c", TELLS_SIGNALS)
    screen.read_until("ready\r\n")
    screen.type(b"\x03")
    screen.read_until("got SIGINT")
    assert read_status(name).alive
    # A SIGINT passed on would have been sent before this: pending signals are taken in the order of their numbers.
    screen.process.send_signal(signal.SIGTERM)
    assert "all ['SIGINT', 'SIGTERM']" in screen.read_all()
    assert screen.process.wait(TIMEOUT_S) == 5
    assert name not in runtime.names()


def test_terminal_shows_the_pages_arriving(source: Path, terminal: Callable[..., Terminal]) -> None:
    script = "import pcshare; b = pcshare.attach(); b.wait(1.0, timeout_s=60); b.close()"
    screen = terminal("run", f"data={source}", "--stream", "64K", "--", sys.executable, "-c", script)
    seen = screen.read_all()
    assert screen.process.wait(TIMEOUT_S) == 0
    assert "█" in seen
    assert "·" in seen
    assert re.search(r"pages on demand, .* by the stream", seen)


def test_without_a_terminal_run_adds_nothing_to_stderr(source: Path) -> None:
    done = pcshare_run("run", str(source), "--", "true")
    assert (done.stdout, done.stderr) == ("", "")


def test_run_that_is_killed_takes_its_coordinator_along(source: Path) -> None:
    name = f"killed-{os.getpid()}"
    with subprocess.Popen(
        [*PROGRAM, "run", "--name", name, str(source), "--", sys.executable, "-c", TELLS_SIGNALS],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        read_until(process.stdout, "ready")
        (child,) = children(process.pid, "-c")
        process.kill()
        process.wait()
        wait_until(lambda: name not in runtime.names() and runtime.find_socket(name) is None, "coordinator gone")
        os.kill(child, signal.SIGTERM)


def children(pid: int, argument: str) -> list[int]:
    """Children of a process whose command line has that argument."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in pids if argument.encode() in Path(f"/proc/{c}/cmdline").read_bytes().split(b"\0")]
