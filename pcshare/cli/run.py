"""run: `pcshare run SOURCE... -- CMD`: a coordinator for as long as CMD runs.

CMD's exit code and signals pass through as if CMD had been started directly. Signals are taken with sigtimedwait and
not by handlers: siginfo tells the Ctrl-C of a terminal, which CMD got already, from a kill, which it did not. CMD is
started with posix_spawn, which can give it the signal mask from before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from pcshare import errors
from pcshare.cli.options import NAME, PAGE_SIZE_AUTO, STREAM_MODES, coordinator_options, json_option, print_json
from pcshare.signals import EXIT_SIGNAL

if TYPE_CHECKING:
    from pcshare.launcher import Coordinator, Event
    from pcshare.status import StatusReport

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # a terminal sends them to the whole foreground process group
SI_KERNEL = 128  # siginfo.si_code: sent by the kernel, as a terminal's driver does
# Python ignores them for itself; a command expects the default.
RESTORED = (signal.SIGPIPE, signal.SIGXFSZ)
PROGRESS_PERIOD_S = 0.1
HEARS_LIMIT_S, LOOK_AGAIN_S = 5.0, 0.005  # until the coordinator has heard that a process ended
PROGRESS_REST = 20  # times as long as it took to paint
EXIT_NOT_FOUND = 127  # as shells say it
EXIT_NOT_EXECUTABLE = 126

COMMAND_KEY = "pcshare.run.command"  # in click's ctx.meta


class CommandNotFound(errors.PcshareError):
    """CMD is not there."""

    exit_status = EXIT_NOT_FOUND


class CommandNotExecutable(errors.PcshareError):
    """CMD is there and cannot be executed."""

    exit_status = EXIT_NOT_EXECUTABLE


class RunCommand(click.Command):
    """What comes after the first -- is the command and none of click's business."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, job = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
        ctx.meta[COMMAND_KEY] = job
        return super().parse_args(ctx, own)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "-- CMD..."]


@click.command(name="run", cls=RunCommand)
@click.argument("sources", nargs=-1, required=True, metavar="[BLOCK=]SOURCE...")
@click.option("--name", type=NAME, default=None, help="Name of the coordinator.  [default: a new one]")
@coordinator_options
@click.option(
    "--progress/--no-progress", default=True, help="A line that shows the arriving pages, if stderr is a terminal."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context, /, sources: Sequence[str], name: str | None, as_json: bool, progress: bool, **serving: Any
) -> int:
    """Run CMD with a coordinator that serves the SOURCEs for as long as CMD runs.

    In CMD and all it starts, pcshare.attach() without a name finds the coordinator (PCSHARE_SOCKET, PCSHARE_NAME).
    The exit code is CMD's, 128+n if signal n ended it, 127 if CMD was not found, 126 if it cannot be executed.
    SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on to CMD. With --json CMD's stdout goes to stderr.

    \b
    Examples:
      pcshare run big.npy -- python job.py
      pcshare run --stream 200M data=big.npy index=/nfs/index.bin -- ./workers.sh 8
      pcshare run scratch=zero:1G -- python job.py
    """
    from pcshare.launcher import Coordinator

    job: list[str] = ctx.meta[COMMAND_KEY]
    if not job:
        raise click.UsageError("no CMD given; it follows --, as in: pcshare run big.npy -- python job.py")
    started_s = time.monotonic()
    coordinator = Coordinator(name, sources, on_event=_say_event, **_launch_options(**serving))
    with coordinator:
        exit_code = _run_job(coordinator, job, stdout_to_stderr=as_json, progress=progress and not as_json)
        report = _last_report(coordinator)
    total_s = time.monotonic() - started_s
    if as_json:
        print_json(_told(coordinator.name, exit_code, total_s, report))
    elif progress and report is not None:
        _print_summary(report, total_s)
    return exit_code


def _launch_options(
    stream: tuple[int, int] | None,
    orphan_timeout: float | None,
    notifier_timeout: float,
    source_timeout: float,
    fault_timeout: float,
    page_size: int,
    **same: Any,
) -> dict[str, Any]:
    """The command line's words as the launcher's."""
    return {
        "stream": None if stream is None else _stream_word(*stream),
        "page_size": "auto" if page_size == PAGE_SIZE_AUTO else page_size,
        "orphan_timeout_s": orphan_timeout,
        "notifier_timeout_s": notifier_timeout,
        "source_timeout_s": source_timeout,
        "fault_timeout_s": fault_timeout,
        **same,
    }


def _stream_word(mode: int, rate: int) -> str:
    word = {number: word for word, number in STREAM_MODES.items()}[mode]
    return str(rate) if word == "rate" else word


def _say_event(event: Event) -> None:
    """What the user must know although CMD runs, and the coordinator, which writes to the same stderr, cannot say."""
    if event.name == "ended":
        click.echo(f"pcshare: the coordinator has ended ({event.reason}); what has not arrived will not come", err=True)


def _told(name: str, exit_code: int, total_s: float, report: StatusReport | None) -> dict[str, Any]:
    """One object for --json. blocks and helpers are null if the coordinator was gone when the command ended."""
    helpers = report and {
        "joined": report.helpers_joined,
        "left": report.helpers_left,
        "faults": report.faults,
        "blocktime_us": report.blocktime.to_json(),
    }
    return {
        "name": name,
        "exit_code": exit_code,
        "total_s": round(total_s, 6),
        "blocks": report and [block.to_json() for block in report.blocks],
        "helpers": helpers,
    }


# -- the command


def _run_job(coordinator: Coordinator, job: Sequence[str], *, stdout_to_stderr: bool, progress: bool) -> int:
    environment = {**os.environ, "PCSHARE_SOCKET": coordinator.socket or "", "PCSHARE_NAME": coordinator.name}
    with _signals_held() as mask:
        pid = _spawn(job, environment, mask, stdout_to_stderr)
        with _progress_line(coordinator, progress) as line:
            code = os.waitstatus_to_exitcode(_wait(pid, line))
    return code if code >= 0 else EXIT_SIGNAL - code


@contextlib.contextmanager
def _signals_held() -> Iterator[set[int]]:
    """Keeps the signals for sigtimedwait; gives the mask from before."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored it would take away the exit code
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*FORWARDED, signal.SIGCHLD))
    try:
        yield {int(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _spawn(job: Sequence[str], environment: dict[str, str], mask: set[int], stdout_to_stderr: bool) -> int:
    try:
        return os.posix_spawnp(
            job[0],
            list(job),
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)] if stdout_to_stderr else [],
            setsigmask=mask,
            setsigdef=RESTORED,
        )
    except OSError as error:
        kind = CommandNotFound if error.errno in (errno.ENOENT, errno.ENOTDIR) else CommandNotExecutable
        raise kind(f"cannot run {shlex.quote(job[0])}: {error.strerror}", errno=error.errno) from None


def _wait(pid: int, line: _ProgressLine) -> int:
    """Until the command has ended: its wait status. Passes signals on and paints."""
    while True:
        told = _next_signal(line.period_s)
        if told is None:
            line.paint()
        elif told.si_signo in FORWARDED and not (told.si_signo in FROM_TERMINAL and told.si_code == SI_KERNEL):
            os.kill(pid, told.si_signo)  # not waited for yet: the pid is still the command's
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status


def _next_signal(period_s: float | None) -> signal.struct_siginfo | None:
    signals = (*FORWARDED, signal.SIGCHLD)
    return signal.sigwaitinfo(signals) if period_s is None else signal.sigtimedwait(signals, period_s)


# -- what is shown


class _ProgressLine:
    """One line on the terminal while pages arrive. period_s: how often paint() is wanted; None: no more."""

    def __init__(self, coordinator: Coordinator) -> None:
        from rich.console import Console
        from rich.live import Live

        from pcshare.views.progress import STRIP_CELLS, ProgressView, is_plain

        self._name = coordinator.name
        self._view = ProgressView(STRIP_CELLS)
        self._console = Console(stderr=True)
        self._plain = is_plain(self._console)
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self.period_s: float | None = None

    def start(self) -> None:
        if self._console.is_terminal:
            self.period_s = PROGRESS_PERIOD_S
            self._live.start()

    def paint(self) -> None:
        from pcshare.status import StatusReader

        started_s = time.monotonic()
        try:
            with StatusReader(self._name) as reader:
                self._view.update(reader.report(), reader.bitmap)
        except errors.PcshareError:  # it has ended; what the user should know is said elsewhere
            self.stop()
            return
        self._live.update(self._view.line(self._plain), refresh=True)
        if self._view.complete:
            self.stop()
        else:  # the bitmap of a terabyte takes a while to read: the command needs the CPU more than we do
            self.period_s = max(PROGRESS_PERIOD_S, PROGRESS_REST * (time.monotonic() - started_s))

    def stop(self) -> None:
        self.period_s = None
        self._live.stop()


@contextlib.contextmanager
def _progress_line(coordinator: Coordinator, wanted: bool) -> Iterator[_ProgressLine]:
    line = _ProgressLine(coordinator)
    if wanted:
        line.start()
    try:
        yield line
    finally:
        line.stop()


def _last_report(coordinator: Coordinator) -> StatusReport | None:
    """How it stood when the command had ended, and the coordinator heard of helpers that ended with it; None if it was
    gone by then."""
    deadline_s = time.monotonic() + HEARS_LIMIT_S
    try:
        while True:
            report = coordinator.status()
            has_heard = all(os.path.exists(f"/proc/{helper.pid}") for helper in report.helpers)
            if has_heard or time.monotonic() >= deadline_s:
                return report
            time.sleep(LOOK_AGAIN_S)
    except errors.PcshareError:
        return None


def _print_summary(report: StatusReport, total_s: float) -> None:
    from rich.console import Console

    from pcshare.views.report import run_summary

    console = Console(stderr=True)
    if console.is_terminal:
        console.print(run_summary(report, total_s))
