"""errors: message and cure, exit codes, pickling, and which errno becomes what."""

from __future__ import annotations

import errno
import json
import pickle

import pytest

from pcshare import errors

ALL_CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.PcshareError)
]


def test_text_is_the_message_then_the_cure() -> None:
    assert str(errors.PcshareError("no room")) == "no room"
    assert str(errors.PcshareError("no room", hint="make some")) == "no room; make some"


@pytest.mark.parametrize("cls", ALL_CLASSES)
def test_every_error_survives_pickling(cls: type[errors.PcshareError]) -> None:
    error = pickle.loads(pickle.dumps(cls("what", errno=errno.EIO, hint="cure")))
    assert type(error) is cls
    assert (error.message, error.errno, error.hint, str(error)) == ("what", errno.EIO, "cure", "what; cure")


def test_lost_range_survives_pickling() -> None:
    lost = pickle.loads(pickle.dumps(errors.SourceLost("gone", offset=4096, length=8192, block="data")))
    assert (lost.offset, lost.length, lost.block, lost.errno) == (4096, 8192, "data", errno.EIO)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PcshareError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.HostError("x"), 3),
        (errors.AttachTimeout("x"), 1),
        (KeyboardInterrupt(), 130),
        (ValueError("x"), 1),
    ],
)
def test_exit_code_tells_usage_and_host_from_failure(error: BaseException, code: int) -> None:
    assert errors.exit_code(error) == code


def test_timeouts_and_refusals_are_also_pythons_own() -> None:
    with pytest.raises(TimeoutError):
        errors.check(-errno.ETIMEDOUT, "attach")
    with pytest.raises(PermissionError):
        errors.check(-errno.EACCES, "attach")


@pytest.mark.parametrize("error", [errors.UsageError("a", hint="b"), errors.HostError("c", errno=65)])
def test_error_comes_out_of_json_as_it_went_in(error: errors.PcshareError) -> None:
    again = errors.from_json(json.loads(json.dumps(errors.to_json(error))))
    assert (type(again), again.message, again.errno, again.hint) == (
        type(error),
        error.message,
        error.errno,
        error.hint,
    )


def test_error_of_a_class_that_is_not_known_here_comes_as_the_nearest() -> None:
    class Odd(errors.HostError):
        pass

    class Unknown(errors.SourceError):
        pass

    assert type(errors.from_json(errors.to_json(Odd("x")))) is errors.HostError
    assert type(errors.from_json(errors.to_json(Unknown("x")))) is errors.SourceError
    assert type(errors.from_json({"type": "Strange", "error": "x", "exit": errors.EXIT_USAGE})) is errors.UsageError
    assert type(errors.from_json(errors.to_json(OSError(2, "x")))) is errors.PcshareError


def test_check_returns_what_is_no_failure() -> None:
    assert errors.check(0, "x") == 0
    assert errors.check(7, "x") == 7


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (errno.EPROTO, errors.RemoteProtocolError),
        (errno.EPROTONOSUPPORT, errors.VersionMismatch),
        (errno.ENODEV, errors.NoSuchBlock),
        (errno.EROFS, errors.NotWritable),
        (errno.EACCES, errors.AccessRefused),
        (errno.EUSERS, errors.LimitReached),
        (errno.ECONNRESET, errors.CoordinatorGone),
        (errno.ETIMEDOUT, errors.AttachTimeout),
        (errno.EIO, errors.PcshareError),
    ],
)
def test_check_raises_what_the_errno_stands_for(code: int, cls: type[errors.PcshareError]) -> None:
    with pytest.raises(errors.PcshareError) as caught:
        errors.check(-code, "attaching 'a'")
    assert type(caught.value) is cls
    assert caught.value.errno == code
    assert str(caught.value).startswith("attaching 'a': ")
    assert (caught.value.hint is None) == (cls is errors.RemoteProtocolError or cls is errors.PcshareError)


def test_words_of_the_core_bring_their_own_cure() -> None:
    with pytest.raises(errors.NotWritable) as caught:
        errors.check(-errno.EROFS, "attaching", "block 'a' is read-only: use mode='cow'")
    assert str(caught.value) == "attaching: block 'a' is read-only: use mode='cow'"
