"""command: the command lines of sources that are processes: exec, ssh, objects. Words in, words out; runs nothing."""

from __future__ import annotations

import os
import shlex
import sys

from pcshare.errors import UsageError
from pcshare.sources.grammar import ExecTarget, ObjectTarget, SshTarget

SSH_VARIABLE = "PCSHARE_SSH"  # replaces the word ssh: a command with its options, in words as a shell reads them
REMOTE_VARIABLE = "PCSHARE_REMOTE"  # replaces the word pcshare at the other end: that end's shell reads it as it is
EXPORT = "data"  # what the other end calls the file, its only export

PROVIDER_SHARE = 25 / 30  # of the time that an answer may take: what went wrong is better told than found out

SSH_CONNECT_TIMEOUT_S = 10
SSH_ALIVE_INTERVAL_S, SSH_ALIVE_COUNT = 10, 3  # an end that says nothing for so long is gone
_SSH_OPTIONS = (
    "BatchMode=yes",  # nobody is there to type a password
    f"ConnectTimeout={SSH_CONNECT_TIMEOUT_S}",
    f"ServerAliveInterval={SSH_ALIVE_INTERVAL_S}",
    f"ServerAliveCountMax={SSH_ALIVE_COUNT}",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "EscapeChar=none",  # what goes through is no text
    "RequestTTY=no",
)


def command_of(target: ExecTarget | SshTarget | ObjectTarget, reply_timeout_s: float) -> list[str]:
    """The words of the process that answers NBD for a source, each time within reply_timeout_s. UsageError:
    PCSHARE_SSH cannot be read."""
    if isinstance(target, ExecTarget):
        return list(target.words)
    if isinstance(target, ObjectTarget):
        timeout_s = f"{reply_timeout_s * PROVIDER_SHARE:g}"
        return [sys.executable, "-P", "-m", "pcshare.serve.objects", target.url, timeout_s]
    return _ssh_command(target)


def _ssh_command(target: SshTarget) -> list[str]:
    options = [word for option in _SSH_OPTIONS for word in ("-o", option)]
    port = ["-p", str(target.port)] if target.port else []
    return [*_ssh_words(), *options, *port, "--", target.host, _remote_command(target.path)]


def _ssh_words() -> list[str]:
    text = os.environ.get(SSH_VARIABLE) or "ssh"
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{SSH_VARIABLE}={text!r} cannot be read: {error}", hint="quote it as for a shell") from None
    if not words:
        raise UsageError(f"{SSH_VARIABLE}={text!r} names no command", hint=f"unset {SSH_VARIABLE}, or name one")
    return words


def _remote_command(path: str) -> str:
    """One line for the shell at the other end, which would expand nothing inside quotes: there a path that is not
    absolute begins at the user's home in any case."""
    remote = os.environ.get(REMOTE_VARIABLE) or "pcshare"
    file = f"{EXPORT}={path.removeprefix('~/')}"  # with a name, so that no '=' of the path is taken for one
    return f"{remote} serve --stdio -- {shlex.quote(file)}"
