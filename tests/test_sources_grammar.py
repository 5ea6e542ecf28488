"""The grammar of sources, as docs/reference/sources.md tells it. No file is touched here."""

from __future__ import annotations

import errno
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pcshare.errors import UsageError
from pcshare.serve import object_reader
from pcshare.sources import FilterSpec, SourceSpec, link, open_source, parse_argument, parse_arguments, shown
from pcshare.sources.command import command_of
from pcshare.sources.filters import DELAY_US_MAX, RESERVED_ERRORS, TIMEOUT_MS_MAX
from pcshare.sources.grammar import (
    BLOCK_NAME,
    BLOCK_NAME_MAX,
    EQUIVALENTS_MAX,
    KNOWN_SCHEMES,
    OBJECT_SCHEME,
    SOURCE_LENGTH_MAX,
    ExecTarget,
    ObjectTarget,
    SshTarget,
    Target,
    TcpTarget,
    UnixTarget,
)

NO_FILTERS = FilterSpec()


@pytest.mark.parametrize(
    ("text", "block", "scheme", "target"),
    [
        ("big.npy", "big", "file", "big.npy"),
        ("dir/big.npy", "big", "file", "dir/big.npy"),
        ("/abs/a.tar.gz", "a.tar", "file", "/abs/a.tar.gz"),
        ("weights=big.npy", "weights", "file", "big.npy"),
        ("a-b.c_1=x", "a-b.c_1", "file", "x"),
        ("w=a=b", "w", "file", "a=b"),
        ("./a=b.bin", "a_b", "file", "./a=b.bin"),
        ("/data/a=b.bin", "a_b", "file", "/data/a=b.bin"),
        ("=b", "_b", "file", "=b"),
        ("file:big.npy", "big", "file", "big.npy"),
        ("FILE:big.npy", "big", "file", "big.npy"),
        ("file:/abs/big.npy", "big", "file", "/abs/big.npy"),
        ("file:///abs/big.npy", "big", "file", "/abs/big.npy"),
        ("file://localhost/abs/big.npy", "big", "file", "/abs/big.npy"),
        ("w=file:a=b", "w", "file", "a=b"),
        ("file:a=b", "a_b", "file", "a=b"),
        ("file:a%23b%2Cc%25d", "a_b_c_d", "file", "a#b,c%d"),
        ("file:a?b+c", "a_b_c", "file", "a?b+c"),
        ("file:x:y", "x_y", "file", "x:y"),
        ("./x:y", "x_y", "file", "./x:y"),
        ("a%23b", "a_23b", "file", "a%23b"),
        ("a#b.npy", "a_b", "file", "a#b.npy"),
        ("a#1=2", "a_1_2", "file", "a#1=2"),
        ("a#", "a_", "file", "a#"),
        (".hidden", ".hidden", "file", ".hidden"),
        ("dir/", "dir", "file", "dir/"),
        ("größe.npy", "gr_e", "file", "größe.npy"),
        ("\u65e5\u672c.npy", "block", "file", "\u65e5\u672c.npy"),
        ("/", "block", "file", "/"),
        ("zero:64M", "zero", "zero", "64M"),
        ("scratch=zero:4096", "scratch", "zero", "4096"),
    ],
)
def test_source_without_filters(text: str, block: str, scheme: str, target: str) -> None:
    assert parse_argument(text) == SourceSpec(block, scheme, target, NO_FILTERS, text)


@pytest.mark.parametrize(
    ("text", "target", "filters"),
    [
        ("big.npy#delay=2ms", "big.npy", FilterSpec(delay_us=2000)),
        ("w=big.npy#rate=200M", "big.npy", FilterSpec(rate=200 << 20)),
        ("big.npy#error=EIO@fail", "big.npy", FilterSpec(error_errno=errno.EIO, error_path="fail")),
        (
            "big.npy#delay=2ms&rate=200M&error=ENODATA@/run/fail",
            "big.npy",
            FilterSpec(2000, 200 << 20, errno.ENODATA, "/run/fail"),
        ),
        ("a#b.npy#delay=1s", "a#b.npy", FilterSpec(delay_us=1_000_000)),
        ("file:a%23b.npy#delay=1s", "a#b.npy", FilterSpec(delay_us=1_000_000)),
        ("big.npy#error=EIO@a%26b%23c", "big.npy", FilterSpec(error_errno=errno.EIO, error_path="a&b#c")),
        ("big.npy#error=EIO@a:b=c@d#e", "big.npy", FilterSpec(error_errno=errno.EIO, error_path="a:b=c@d#e")),
        ("zero:4K#delay=1us", "4K", FilterSpec(delay_us=1)),
    ],
)
def test_filters_follow_the_source(text: str, target: str, filters: FilterSpec) -> None:
    spec = parse_argument(text)
    assert (spec.target, spec.filters, bool(spec.filters)) == (target, filters, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "source in '' is empty"),
        ("data=", "source in 'data=' is empty"),
        ("file:", "no path in 'file:'"),
        ("file:#delay=2ms", "no path in"),
        ("#delay=2ms", "no path before the filters"),
        ("a\0b", "NUL"),
        ("file:a%00b", "NUL"),
        ("\ud800", "no text that can name a file"),
        ("file:%zz", "not followed by two hexadecimal digits"),
        ("file:50%", "not followed by two hexadecimal digits"),
        ("file://host/abs", "names the host 'host'"),
        ("file://localhost", "names the host 'localhost'"),
        ("file:a#", "unknown filter ''"),
        ("file:a#b", "unknown filter 'b'"),
        ("a#dealy=2ms", "unknown filter 'dealy=2ms'"),
        ("a#delay=2ms&", "unknown filter ''"),
        ("a#delay=2ms&delay=3ms", "'delay' is given twice"),
        ("a#delay=", "'delay=' is not right"),
        ("a#delay=2x", "'delay=2x' is not right"),
        ("a#delay=0s", "'delay=0s' is not right"),
        ("a#delay=2h", "'delay=2h' is not right"),
        ("a#delay=" + "9" * 5000, "is not right"),
        ("a#rate=0", "'rate=0' is not right"),
        ("a#rate=fast", "'rate=fast' is not right"),
        ("a#rate=2T", "'rate=2T' is not right"),
        ("a#rate=" + "9" * 5000, "is not right"),
        ("a#error=EIO", "'error=EIO' is not right"),
        ("a#error=EIO@", "'error=EIO@' is not right"),
        ("a#error=EWHAT@f", "'error=EWHAT@f' is not right"),
        ("a#error=errorcode@f", "is not right"),
        ("a#error=5@f", "is not right"),
        ("a#error=ECANCELED@f", "is not right"),
        ("a#error=EIO@%", "not followed by two hexadecimal digits"),
        ("zero:", "size in 'zero:' is not right"),
        ("zero:many", "size in 'zero:many' is not right"),
        ("zero:-1", "size in 'zero:-1' is not right"),
        ("zero:0", "asks for 0 bytes"),
        ("zero:65T", "asks for"),
        ("zero:" + "9" * 5000, "is not right"),
        ("x" * 64 + "=a", "longer than 63 bytes"),
    ],
)
def test_refusal_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_argument(text)


@pytest.mark.parametrize("text", ["a#delay=2x", "zero:many", "file:%zz", "a,b", "nbd:h", "data=", "a#x=1", "exec:"])
def test_refusal_has_a_cure(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_argument(text)
    assert refusal.value.hint


@pytest.mark.parametrize(
    "text",
    ["big:#delay=2ms", "a b:c", "gr\u00f6\u00dfe:x", "-oProxyCommand:x", "-x@host:p", "qemu+rdma:h:1", "nbds://h/x"],
)
def test_unknown_scheme_names_the_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match="unknown kind of source") as refusal:
        parse_argument(text)
    assert refusal.value.hint
    assert "://" in refusal.value.hint or "migration" in refusal.value.hint


def test_message_of_an_unknown_scheme_names_every_known_one() -> None:
    with pytest.raises(UsageError) as refusal:
        parse_argument("a b:c")
    assert all(f"{scheme}:" in str(refusal.value) for scheme in KNOWN_SCHEMES if scheme != OBJECT_SCHEME)


def test_unknown_scheme_in_a_handmade_spec_is_refused_at_open() -> None:
    with pytest.raises(UsageError, match="unknown kind of source 'tape'"):
        open_source(SourceSpec("b", "tape", "x", NO_FILTERS, "tape:x"))


@pytest.mark.parametrize(
    "text", ["a.npy,b.npy", "w=a.npy,b.npy", "file:a,file:b", "zero:4K,zero:4K", "a.npy,nbd://h/x"]
)
def test_equivalent_sources_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="2 equivalent sources") as refusal:
        parse_argument(text)
    assert "%2C" in str(refusal.value)


# -- servers


@pytest.mark.parametrize(
    ("text", "block", "scheme", "target"),
    [
        ("nbd://h/x", "x", "nbd", TcpTarget("nbd://h/x", "h", 10809, "x")),
        ("NBD://h/x", "x", "nbd", TcpTarget("NBD://h/x", "h", 10809, "x")),
        ("w=nbd://10.0.0.1:99/a/b.npy", "w", "nbd", TcpTarget("nbd://10.0.0.1:99/a/b.npy", "10.0.0.1", 99, "a/b.npy")),
        ("nbd://[::1]:99/a%2Cb%23", "a_b_", "nbd", TcpTarget("nbd://[::1]:99/a%2Cb%23", "::1", 99, "a,b#")),
        ("nbd://[fe80::1%25eth0]/x", "x", "nbd", TcpTarget("nbd://[fe80::1%25eth0]/x", "fe80::1%eth0", 10809, "x")),
        ("nbd://h", "block", "nbd", TcpTarget("nbd://h", "h", 10809, "")),
        ("nbd://h//x", "x", "nbd", TcpTarget("nbd://h//x", "h", 10809, "/x")),
        ("nbd://h/gr%C3%B6", "gr_", "nbd", TcpTarget("nbd://h/gr%C3%B6", "h", 10809, "gr\u00f6")),
        (
            "nbd+unix:///x?socket=/run/a%20b",
            "x",
            "nbd+unix",
            UnixTarget("nbd+unix:///x?socket=/run/a%20b", "/run/a b", "x"),
        ),
        (
            "nbd+unix://?a=b&socket=rel.sock",
            "block",
            "nbd+unix",
            UnixTarget("nbd+unix://?a=b&socket=rel.sock", "rel.sock", ""),
        ),
        ("exec:a 'b c' d", "block", "exec", ExecTarget("exec:a 'b c' d", ("a", "b c", "d"))),
        ("exec:a x=1 #2", "block", "exec", ExecTarget("exec:a x=1 #2", ("a", "x=1", "#2"))),
        ("host:x.npy", "x", "ssh", SshTarget("host:x.npy", "host", 0, "x.npy")),
        ("w=me@host:/d/a b,c#d", "w", "ssh", SshTarget("me@host:/d/a b,c#d", "me@host", 0, "/d/a b,c#d")),
        ("[::1]:x", "x", "ssh", SshTarget("[::1]:x", "::1", 0, "x")),
        ("me@[::1]:a:b", "a_b", "ssh", SshTarget("me@[::1]:a:b", "me@::1", 0, "a:b")),
        ("ssh://me@h:22/a%20b", "a_b", "ssh", SshTarget("ssh://me@h:22/a%20b", "me@h", 22, "/a b")),
        ("ssh://h/d/x", "x", "ssh", SshTarget("ssh://h/d/x", "h", 0, "/d/x")),
        ("s3://b/d/k.npy", "k", "object", ObjectTarget("s3://b/d/k.npy", "s3://b/d/k.npy")),
        ("https://h/k.npy?a=b,c", "k", "object", ObjectTarget("https://h/k.npy?a=b,c", "https://h/k.npy?a=b,c")),
        ("memory://k", "k", "object", ObjectTarget("memory://k", "memory://k")),
    ],
)
def test_server(text: str, block: str, scheme: str, target: Target) -> None:
    spec = parse_argument(text)
    assert (spec.block, spec.scheme, spec.equivalents) == (block, scheme, (target,))
    assert spec.target == target.text


def test_comma_before_a_scheme_separates_equivalents_and_filters_follow_the_whole() -> None:
    spec = parse_argument(
        "w=nbd://a/x,nbd+unix:///x?socket=/s,exec:p a,b,host:y,ssh://h/z,s3://b/k#delay=1ms&timeout=3s"
    )
    kinds = [TcpTarget, UnixTarget, ExecTarget, SshTarget, ObjectTarget]
    assert [type(target) for target in spec.equivalents] == kinds
    assert isinstance(spec.equivalents[2], ExecTarget)
    assert spec.equivalents[2].words == ("p", "a,b,host:y")
    assert (spec.filters.delay_us, spec.filters.timeout_ms) == (1000, 3000)
    assert spec.target.endswith("s3://b/k")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nbd:h", "no URI of that form"),
        ("nbd:///x", "'' is no HOST[:PORT]"),
        ("nbd://u@h/x", "'u@h' is no HOST[:PORT]"),
        ("nbd://u:secret@h/x", "'u:***@h' is no HOST[:PORT]"),
        ("nbd://::1/x", "is no HOST[:PORT]"),
        ("nbd://h:0/x", "there is no port 0"),
        ("nbd://h:65536/x", "there is no port 65536; ports are numbers between 1 and 65535"),
        ("nbd://h/%FF", "is no UTF-8"),
        ("nbd://h/%00", "NUL"),
        ("nbd://h/" + "x" * 4097, "4097 bytes"),
        ("nbd://h/x#y", "unknown filter 'y'"),
        ("nbd+unix:///x", "does not name one socket"),
        ("nbd+unix:///x?socket=", "does not name one socket"),
        ("nbd+unix:///x?socket=/a&socket=/b", "does not name one socket"),
        ("nbd+unix://h/x?socket=/a", "a Unix socket has no host"),
        ("exec:", "there is no command"),
        ("exec:  ", "there is no command"),
        ("exec:'a", "cannot be read"),
        ("exec:a\0b", "NUL"),
        ("ssh://h", "names no host, or no path"),
        ("ssh://h/", "names no host, or no path"),
        ("ssh:h", "no place on a host"),
        ("ssh://-h/x", "names no host, or no path"),
        ("host:a\0b", "NUL"),
        ("s3://", "names no object"),
        ("a:/x,b:/y", "'b:/y' has none; write it as ssh://b/y"),
        ("w=me@a:x,me@[::1]:/y,c:/z", "write it as ssh://me@[::1]/y"),
        ("nbd://a/x,b:/y", "needs a scheme to be an equivalent source"),
        ("ssh://a/x,b:/y", "write it as ssh://b/y"),
        ("nbd://a/x,file:b", "a file source stands alone"),
        ("nbd://a/x,zero:4K", "a zero source stands alone"),
        (",".join(["nbd://a/x"] * (EQUIVALENTS_MAX + 1)), f"more than {EQUIVALENTS_MAX}"),
        ("a#timeout=3s", "a file source has no timeout"),
        ("zero:4K#timeout=3s", "a zero source has no timeout"),
        ("nbd://h/x#timeout=0s", "'timeout=0s' is not right"),
        ("nbd://h/x#timeout=2h", "'timeout=2h' is not right"),
        ("nbd://h/x#timeout=soon", "'timeout=soon' is not right"),
    ],
)
def test_refusal_of_a_server_says_what_is_wrong_and_has_a_cure(text: str, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_argument(text)
    assert message in str(refusal.value)
    assert refusal.value.hint
    assert "secret" not in str(refusal.value)


def test_comma_and_colon_in_a_path_are_written_percent_encoded() -> None:
    (target,) = parse_argument("ssh://a/x%2Cb:/y").equivalents
    assert isinstance(target, SshTarget)
    assert target.path == "/x,b:/y"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://u:secret@h/a?sig=secret&X-Amz-Signature=secret", "https://u:***@h/a?sig=***&X-Amz-Signature=***"),
        ("w=HTTPS://h/a?secret#timeout=3s", "w=HTTPS://h/a?***#timeout=3s"),
        ("https://h/a?s=secret#secret#rate=1M&delay=1ms", "https://h/a?s=***#rate=1M&delay=1ms"),
        ("https://h/a?s=secret,secret,nbd+unix:///x?socket=/s", "https://h/a?s=***,nbd+unix:///x?socket=/s"),
        ("https://u:sec@ret@h:8080/a", "https://u:***@h:8080/a"),
        ("ftp://u:secret@host/a?b", "ftp://u:***@host/a?b"),
        ("s3://bucket/what?@x:y@z", "s3://bucket/what?@x:y@z"),
        ("az://c/a?sv=1&sig=secret", "az://c/a?sv=***&sig=***"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("zip://a::ftp://u:secret@host/b.zip", "zip://a::ftp://u:***@host/b.zip"),
        ("exec:nbdkit -s curl 'https://u:secret@h/a?t=secret'", "exec:nbdkit -s curl 'https://u:***@h/a?t=***'"),
        ("nbd://h:10809/x@y,ssh://me@h:22/a?b=c", "nbd://h:10809/x@y,ssh://me@h:22/a?b=c"),
        ("nbd+unix:///x?socket=/s#timeout=3s", "nbd+unix:///x?socket=/s#timeout=3s"),
        ("me@h:a?b=c", "me@h:a?b=c"),
        ("big?a=b.npy", "big?a=b.npy"),
    ],
)
def test_text_is_shown_without_secrets(text: str, told: str) -> None:
    assert shown(text) == told
    assert shown(told) == told


@pytest.mark.parametrize(
    "text", ["s3://u:secret@", "https://u:secret@h/a?secret#no=1", "https://u:secret@h\0/a?secret"]
)
def test_refusal_tells_no_secret(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_arguments([text, text])
    assert "secret" not in str(refusal.value)


def test_two_of_one_name_are_told_without_secrets() -> None:
    with pytest.raises(UsageError, match="both block 'a'") as refusal:
        parse_arguments(["https://h/a?secret", "https://u:secret@h/a"])
    assert "secret" not in str(refusal.value)


def test_password_makes_no_name() -> None:
    assert parse_argument("https://u:secret@h").block == "h"


def test_a_timeout_alone_changes_no_request() -> None:
    assert not parse_argument(f"nbd://h/x#timeout={TIMEOUT_MS_MAX // 1000}s").filters.changes_requests


def test_ssh_is_told_the_remote_path_in_one_quoted_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PCSHARE_SSH", "PCSHARE_REMOTE"):
        monkeypatch.delenv(name, raising=False)
    command = command_of(SshTarget("", "me@h", 22, "/a b;reboot"), 30)
    assert command[0] == "ssh"
    assert "BatchMode=yes" in command
    assert command[-4:] == ["22", "--", "me@h", "pcshare serve --stdio -- 'data=/a b;reboot'"]
    assert command[-5] == "-p"
    assert command_of(SshTarget("", "h", 0, "~/x"), 30)[-1].endswith(" -- data=x")


def test_environment_replaces_the_words_ssh_and_pcshare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCSHARE_SSH", "sesame -i 'a key'")
    monkeypatch.setenv("PCSHARE_REMOTE", "~/venv/bin/pcshare")
    command = command_of(SshTarget("", "h", 0, "x"), 30)
    assert command[:3] == ["sesame", "-i", "a key"]
    assert command[-2:] == ["h", "~/venv/bin/pcshare serve --stdio -- data=x"]
    monkeypatch.setenv("PCSHARE_SSH", "'")
    with pytest.raises(UsageError, match="PCSHARE_SSH"):
        command_of(SshTarget("", "h", 0, "x"), 30)


def test_an_object_is_the_business_of_a_provider_which_is_to_fail_before_it_is_given_up() -> None:
    words = command_of(ObjectTarget("", "s3://b/k"), link.REPLY_TIMEOUT_S)
    assert words[1:] == ["-P", "-m", "pcshare.serve.objects", "s3://b/k", f"{object_reader.READ_TIMEOUT_S:g}"]
    assert 0 < float(command_of(ObjectTarget("", "s3://b/k"), 3)[-1]) < 3


def test_comma_in_a_path_is_written_percent_encoded() -> None:
    assert parse_argument("file:a%2Cb.npy").target == "a,b.npy"


def test_undecodable_bytes_of_a_path_survive() -> None:
    path = os.fsdecode(b"/d/\xff.bin")
    assert os.fsencode(parse_argument(path).target) == b"/d/\xff.bin"
    assert os.fsencode(parse_argument("file:/d/%FF.bin").target) == b"/d/\xff.bin"


def test_every_reserved_error_is_refused() -> None:
    for number in RESERVED_ERRORS:
        with pytest.raises(UsageError):
            parse_argument(f"a#error={errno.errorcode[number]}@f")


def test_limits_themselves_are_accepted() -> None:
    assert parse_argument(f"zero:{SOURCE_LENGTH_MAX}").target == str(SOURCE_LENGTH_MAX)
    assert parse_argument(f"a#delay={DELAY_US_MAX // 1_000_000}s").filters.delay_us == DELAY_US_MAX
    assert parse_argument("x" * BLOCK_NAME_MAX + "=a").block == "x" * BLOCK_NAME_MAX


def test_name_taken_from_a_long_file_name_is_cut_to_the_limit() -> None:
    assert parse_argument("y" * 200 + ".npy").block == "y" * BLOCK_NAME_MAX


def test_name_limit_is_that_of_the_wire() -> None:
    wire = (Path(__file__).parent.parent / "pcshare" / "core" / "wire.h").read_text()
    limit = re.search(r"WIRE_IDSTR_MAX = (\d+)", wire)
    assert limit
    assert int(limit[1]) - 1 == BLOCK_NAME_MAX


def test_documented_arguments_have_the_documented_names_and_sources() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reference" / "sources.md").read_text()
    table = page.split("| argument | block | source |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|$", table, re.MULTILINE)
    assert len(rows) >= 7
    for argument, block, source in rows:
        spec = parse_argument(argument)
        assert (spec.block, spec.target) == (block, source.removeprefix("zero:"))


def test_arguments_keep_their_order() -> None:
    assert [s.block for s in parse_arguments(["b=x", "a=y", "zero:1"])] == ["b", "a", "zero"]


def test_duplicate_block_names_are_refused_with_both_sources() -> None:
    with pytest.raises(UsageError, match="both block 'x'") as refusal:
        parse_arguments(["a/x.npy", "b/x.npy"])
    assert "a/x.npy" in str(refusal.value)
    assert "b/x.npy" in str(refusal.value)
    assert "NAME=SOURCE" in str(refusal.value)


def test_random_arguments_give_a_spec_or_a_usage_error() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pieces = [
        *"=#&,:/%@.\0 0aZ\u00fc\udcff",
        "file:",
        "zero:",
        "4K",
        "delay=",
        "rate=",
        "error=EIO@",
        "2ms",
        "//",
        "%41",
        "nbd://",
        "nbd+unix:///",
        "?socket=",
        "exec:",
        "ssh://",
        "s3://",
        "h:",
        "[::1]",
        "timeout=",
    ]
    parsed = 0
    for _ in range(40_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(8)))
        try:
            spec = parse_argument(text)
        except UsageError:
            continue
        parsed += 1
        assert BLOCK_NAME.fullmatch(spec.block), text
        assert spec.scheme in KNOWN_SCHEMES, text
        assert spec.target, text
        assert "\0" not in spec.target, text
    assert parsed > 1000


def test_parsing_needs_no_compiled_module() -> None:
    program = (
        "import sys, pcshare.sources as s; s.parse_argument('a#delay=1s'); print('pcshare.core._core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "False"


# ---- a migration stream ----


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("qemu+unix:/run/vm.sock", "/run/vm.sock"),
        ("QEMU+UNIX:vm.sock", "./vm.sock"),
        ("qemu+unix:/run/a%2Cb%23c", "/run/a,b#c"),
        ("qemu+tcp://127.0.0.1:4444", "127.0.0.1:4444"),
        ("qemu+tcp://[::1]:0", "[::1]:0"),
    ],
)
def test_migration_stream_is_a_place_to_listen(text: str, target: str) -> None:
    spec = parse_argument(text)
    assert (spec.block, spec.target, spec.is_incoming) == ("", target, True)


@pytest.mark.parametrize(
    "text",
    [
        "vm=qemu+unix:/run/vm.sock",
        "qemu+unix:",
        "qemu+unix:///run/vm.sock",
        "qemu+unix:/a,nbd://h/x",
        "qemu+unix:/run/vm.sock#delay=2ms",
        "qemu+tcp://h",
        "qemu+tcp://h:70000",
        "qemu+tcp://h:1/x",
        "qemu+tcp:h:1",
    ],
)
def test_migration_stream_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_argument(text)
    assert refusal.value.hint


def test_migration_stream_stands_alone() -> None:
    with pytest.raises(UsageError, match="all that a coordinator serves"):
        parse_arguments(["zero:4K", "qemu+unix:/run/vm.sock"])
