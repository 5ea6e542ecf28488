"""docs: what the pages say is what is built: options, names, layouts, states, links, and examples that really run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest

import pcshare
from pcshare import cli, errors, protocol
from pcshare.client import Progress
from pcshare.core import ffi
from pcshare.launcher import Event
from pcshare.serve import object_reader
from pcshare.sources import command as source_command
from pcshare.sources import endpoint, link
from pcshare.state import TRANSITIONS
from support_coordinator import coordinator
from test_rooms import ROOMS, ROOT

DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
TUTORIAL = DOCS / "tutorial.md"
ATTACH = DOCS / "how-to" / "attach.md"
C_HELPER = DOCS / "how-to" / "c-helper.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLE_TIMEOUT_S = 90.0

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NAMED_PROGRAM = re.compile(r"`(\w+\.(?:py|c))`:\n\n```\w+\n(.*?)^```$", re.M | re.S)
STRUCT_TABLE = re.compile(r"^##+ [^\n]*`(struct \w+)`\n(.*?)(?=^##|\Z)", re.M | re.S)


def text_of(page: Path) -> str:
    return page.read_text()


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next one of the same rank."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.M | re.S)
    assert found, f"no heading {title!r}"
    return found[2]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, headings left out, backticks taken off."""
    rows = []
    for line in text.splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
            rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif re.fullmatch(r"[|\s:-]+", line) and "|" in line:
            rows.pop()  # what stands above the line of dashes is the heading
    return rows


def code_blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


# -- the command line


def command_of(name: str) -> click.Command:
    found = cli.group.get_command(click.Context(cli.group), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_page_of_a_command_has_its_options_and_no_others(name: str) -> None:
    bullets = re.split(r"^\* ", section(text_of(REFERENCE / "cli" / f"{name}.md"), "Options"), flags=re.M)[1:]
    told = {option for bullet in bullets for option in re.findall(r"--[a-z][a-z-]*", bullet.split(":", 1)[0])}
    options = [param for param in command_of(name).params if isinstance(param, click.Option) and not param.hidden]
    built = {flag for option in options for flag in (*option.opts, *option.secondary_opts) if flag.startswith("--")}
    assert told == built | {"--help"}


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_page_of_a_command_is_like_a_man_page(name: str) -> None:
    headings = " ".join(re.findall(r"^## (.*)$", text_of(REFERENCE / "cli" / f"{name}.md"), re.M)).lower()
    wanted = ("synopsis", "description", "options", "signals", "environment", "exit status", "files", "examples")
    assert [title for title in wanted if title not in headings] == []


def test_index_of_the_command_line_lists_every_command() -> None:
    rows = table_rows(text_of(REFERENCE / "cli" / "index.md").split("## What all", 1)[0])
    assert {row[0].split("`")[1] for row in rows} == set(cli.COMMANDS)


# -- links


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(target, anchor) of each link that leads to another file or into this one."""
    prose = FENCE.sub("", text_of(page))
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose):
        if "://" not in target:
            yield target, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in links(page):
        there = (page.parent / target).resolve() if target else page
        if not there.exists():
            broken.append(target)
        elif anchor and anchor not in {slug(title) for title in re.findall(r"^#+ (.*)$", text_of(there), re.M)}:
            broken.append(f"{target}#{anchor}")
    assert broken == []


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        waiting += [there for target, _ in links(page) if (there := (page.parent / target).resolve()).suffix == ".md"]
    assert [page for page in PAGES if DOCS in page.parents and page not in reached] == []


# -- the Python and C interfaces


API = REFERENCE / "api.md"


def is_described(name: str, text: str) -> bool:
    """A name has a heading, a row of a table or its call shown; one that only refuses has half a sentence."""
    pattern = rf"^### {name}\(\)$|^\| `{name}[`(]|^    \w+\.{name}\(|`{name}\(\)` raises"
    return re.search(pattern, text, re.M) is not None


def test_every_error_class_is_described_with_its_base() -> None:
    built = {
        name: {base.__name__ for base in kind.__bases__}
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.PcshareError)
    }
    told = {row[0]: set(re.findall(r"\w+", row[1])) for row in table_rows(section(text_of(API), "Errors"))}
    assert told == built


@pytest.mark.parametrize("kind", [pcshare.Block, pcshare.Handle, pcshare.Coordinator, Progress, Event])
def test_every_public_name_of_a_class_is_described(kind: type) -> None:
    text = section(text_of(API), kind.__name__)
    names = {name for name in vars(kind) if not name.startswith("_")}
    if dataclasses.is_dataclass(kind):
        names |= {field.name for field in dataclasses.fields(kind)}
    assert sorted(name for name in names if not is_described(name, text)) == []


def test_every_public_name_of_the_package_is_described() -> None:
    text = text_of(API)
    assert [name for name in pcshare.__all__ if f"`pcshare.{name}`" not in text] == []


@pytest.mark.parametrize(
    "function",
    [pcshare.attach, pcshare.Coordinator, pcshare.Block.ensure, pcshare.Block.wait, pcshare.Handle.attach],
    ids=lambda function: function.__qualname__,
)
def test_every_argument_is_described_with_its_default(function: object) -> None:
    assert callable(function)
    text = re.sub(r"\s+", " ", text_of(API))
    arguments = inspect.signature(function).parameters.values()
    told = [
        argument.name if argument.default is argument.empty else f"{argument.name}={argument.default!r}"
        for argument in arguments
        if argument.name != "self" and argument.kind is not argument.VAR_KEYWORD
    ]
    assert [one for one in told if one.replace("'", '"') not in text] == []


def test_every_name_of_the_c_api_is_described() -> None:
    header, text = text_of(ROOT / "pcshare" / "core" / "helper.h"), text_of(REFERENCE / "c-api.md")
    built = set(re.findall(r"\b(pcshare_\w+)\(", re.sub(r"/\*.*?\*/", "", header, flags=re.S)))
    assert set(re.findall(r"\b(pcshare_\w+)\(", "\n".join(re.findall(r"^    .*$", text, re.M)))) == built
    constants = re.findall(r"\bPCSHARE_[A-Z]+\b", header.split("enum", 1)[1])
    fields = re.findall(r"^    \w+ (\w+)(?:\[\d+\])?;", header, re.M)
    assert [name for name in {*constants, *fields} if f"`{name}`" not in text] == []


# -- protocols, states, rooms, limits


def test_message_table_is_the_protocols() -> None:
    rows = table_rows(section(text_of(REFERENCE / "control-protocol.md"), "Messages"))
    told = [(int(number), name, int(size), fds, sender) for number, name, size, fds, sender in rows]
    built = []
    for number, row in protocol.MESSAGES.items():
        least, most = row.fds
        fds = str(least) if least == most else f"{least} to {most}"
        built.append((number, row.name, ffi.sizeof(row.ctype), fds, row.sender))
    assert told == built


def struct_tables() -> list[tuple[str, str]]:
    names = ("control-protocol.md", "status-segment.md", "keeper-protocol.md")
    return [(struct, body) for name in names for struct, body in STRUCT_TABLE.findall(text_of(REFERENCE / name))]


@pytest.mark.parametrize(("struct", "body"), struct_tables(), ids=[struct for struct, _ in struct_tables()])
def test_layout_table_is_the_structs(struct: str, body: str) -> None:
    told = [(int(row[0]), int(row[1]), row[2]) for row in table_rows(body)]
    fields = ffi.typeof(struct).fields
    assert told == [(field.offset, ffi.sizeof(field.type), name) for name, field in fields]


def test_every_struct_that_another_process_reads_has_a_layout_table() -> None:
    told = {struct for struct, _ in struct_tables()}
    built = {row.ctype for row in protocol.MESSAGES.values()} | {"struct wire_header", "struct wire_map"}
    built |= {f"struct status_{name}" for name in ("header", "block", "helper", "histogram")}
    assert told == built | {f"struct keeper_{name}" for name in ("request", "answer", "event")}


def test_diagram_of_states_is_the_table() -> None:
    states = section(text_of(DOCS / "explanation" / "architecture.md"), "States")
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", states, re.M))
    assert drawn == {(before.name, after.name) for before, ways in TRANSITIONS.items() for after in ways}
    assert [row[0] for row in table_rows(states)] == [state.name for state in TRANSITIONS]


def test_table_of_rooms_is_the_one_that_imports_are_checked_by() -> None:
    rows = table_rows(section(text_of(DOCS / "explanation" / "architecture.md"), "Rooms"))
    package = ROOT / "pcshare"
    built = []
    for rooms in ROOMS:
        there = [room for room in rooms if (package / room).is_dir() or (package / f"{room}.py").exists()]
        built += [there] if there and not there[0].startswith("__") else []
    assert [re.findall(r"\w+", row[0]) for row in rows] == built


def test_every_constant_that_a_limit_names_exists() -> None:
    rows = table_rows(section(text_of(DOCS / "explanation" / "limits.md"), "Limits"))
    named = {name for row in rows for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b", row[2])}
    files = [path for path in (ROOT / "pcshare").rglob("*") if path.suffix in (".py", ".h", ".c")]
    source = "\n".join(text_of(path) for path in files)
    assert named
    assert [name for name in named if not re.search(rf"\b{name}(: int)? = ", source)] == []


def value_of_limit(name: str) -> float:
    """Of a limit of time: by the modules that keep to them, or by the core."""
    for module in (link, endpoint, source_command, object_reader):
        if hasattr(module, name):
            return float(getattr(module, name))
    core = "\n".join(text_of(path) for path in sorted((ROOT / "pcshare" / "core").glob("*.c")))
    found = re.search(rf"\b{name} = (\d+)\b", core)
    assert found, f"no constant {name}"
    return float(found[1])


def test_time_limits_of_sources_are_those_of_the_code() -> None:
    """A limit cell begins with the values of its constants, in their order."""
    rows = table_rows(section(text_of(REFERENCE / "sources.md"), "Time limits").split("\n## ", 1)[0])
    assert len(rows) > 1
    for _, limit, constants in rows:
        values = [value_of_limit(name) for name in re.findall(r"\w+", constants)]
        told = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", limit.replace("four", "4"))]
        assert told[: len(values)] == values, limit


# -- examples


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_compiles(page: Path) -> None:
    for body in code_blocks(text_of(page), "python"):
        ast.parse(body, str(page))


def test_every_json_block_is_json_and_that_of_containers_lets_userfaultfd_through() -> None:
    for page in PAGES:
        for body in code_blocks(text_of(page), "json"):
            json.loads(body)
    (entry,) = map(json.loads, code_blocks(text_of(DOCS / "how-to" / "containers.md"), "json"))
    assert entry == {"names": ["userfaultfd"], "action": "SCMP_ACT_ALLOW"}


@pytest.fixture
def workshop(tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every program that the tutorial and the how-tos name, and with the tutorial's big.npy; the
    commands python and pcshare are ours."""
    for page in (TUTORIAL, ATTACH, C_HELPER):
        for name, body in NAMED_PROGRAM.findall(text_of(page)):
            (tmp_path / name).write_text(body)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.chdir(tmp_path)
    run_shell("python make.py")
    return tmp_path


def run_shell(command: str) -> str:
    done = subprocess.run(
        ["bash", "-euc", command], capture_output=True, text=True, timeout=EXAMPLE_TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_after(text: str, command: str) -> str:
    """The indented lines that a page shows below a command, or below the block that the command ends."""
    below = text.split(command, 1)[1].split("\n", 1)[1].removeprefix("```\n").lstrip("\n")
    lines = re.match(r"(?:    .*\n)+", below)
    assert lines, f"nothing is shown after {command}"
    return re.sub(r"^    ", "", lines[0], flags=re.M)


def test_job_of_the_tutorial_computes_the_right_thing(workshop: Path) -> None:
    command = next(line.strip() for line in text_of(TUTORIAL).splitlines() if line.endswith("-- python job.py"))
    said = run_shell(command).splitlines()
    table = np.load(workshop / "big.npy")
    shown = shown_after(text_of(TUTORIAL).split(command, 1)[1], "as they arrive):").splitlines()
    without_percent = [line.partition(": ")[2] for line in said]
    assert without_percent == [line.partition(": ")[2] for line in shown]
    assert without_percent[2:4] == [
        f"the mean of row 1500 is {table[1500].mean():.6f}",
        f"the mean of everything is {table.mean():.6f}",
    ]
    assert said[-1] == "100% here: done"


def test_other_programs_of_the_tutorial_run(workshop: Path) -> None:
    text = text_of(TUTORIAL)
    shown = shown_after(text, "python second.py").splitlines()
    with coordinator("big=big.npy", options=["--stream=2M"]) as served:
        program = (workshop / "second.py").read_text().replace('"table"', repr(served.name))
        said = run_shell(f"python -c {shlex.quote(program)}").splitlines()
    assert said[1:] == shown[1:]
    assert run_shell("python both.py") == shown_after(text, "so one page came:")


def test_programs_of_the_how_to_say_what_it_shows(workshop: Path) -> None:
    text = text_of(ATTACH)
    commands = re.findall(r"^    \$ (pcshare run .*)$", text, re.M)
    assert len(commands) == len(NAMED_PROGRAM.findall(text))
    for command in commands:
        assert run_shell(command) == shown_after(text, f"$ {command}")


def test_c_helper_of_the_how_to_compiles_without_a_warning_and_counts_right(workshop: Path) -> None:
    text = text_of(C_HELPER)
    (script,) = code_blocks(text, "sh")
    said = run_shell(script.replace("cc -O2", f"{os.environ.get('CC', 'cc')} -O2 -Werror"))
    assert said == shown_after(text, script)
    content = (workshop / "big.npy").read_bytes()
    assert f"{len(content)} bytes, {content.count(0)} of them" in said
