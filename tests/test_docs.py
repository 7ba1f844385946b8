"""What is written about the listener is what the listener is."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import Field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from listener import queries
from listener.cli import cli
from listener.config import Settings
from listener.template import sql_files
from tests.harness import Database

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
MODULES = {path.stem: path for path in (ROOT / "listener").glob("*.py")}
SETTINGS = {spec.name.upper(): spec for spec in fields(Settings)}

LONGEST_MODULE = 300
LONGER_FOR_A_REASON = {
    "queries": "SQL, all of it in one place on purpose",
}

# A call that says which setting a command reads.
READS = {
    "connect(": "DATABASE_URL",
    "require_reports_dir(": "REPORTS_DIR",
    "write_report(": "REPORTS_DIR",
    "configure_logs(": "LOG_FORMAT",
    "load_encoder(": "CACHE_TEXTS",
    "_serve(": "LEASE_SECONDS",
    "start_endpoint(": "METRICS_PORT",
    "load_embedder(": "ENGINE",
    "locate(": "EMBEDDING_MODEL",
    "fetch(": "EMBEDDING_REVISION",
    "convert(": "MODEL_CACHE",
    "run_demo(": "DEMO_DIR",
    "run_checks(": "NOTIFY",
}


def default_of(spec: Field[Any]) -> str:
    """The default as the documents write it."""
    if spec.name == "demo_dir":  # as root it is another; the README says so
        return "~/.local/share/iot-event-listener"
    if spec.name == "model_cache":  # with XDG_CACHE_HOME it is another
        return "~/.cache/iot-event-listener"
    return f"{spec.default:g}" if isinstance(spec.default, float) else str(spec.default)


def meaning_of(spec: Field[Any]) -> str:
    return str(spec.metadata["help"])


def table(text: str, first_header: str) -> list[list[str]]:
    """The rows of the Markdown table whose first column has this header."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"| {first_header} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def listed_modules() -> list[str]:
    """Those of the architecture page, in its order."""
    return [row[0].strip("`") for row in table(ARCHITECTURE, "Module")]


def commands(group: click.Group = cli, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, those of groups too."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


COMMANDS = dict(commands())


def help_of(name: str) -> str:
    result = CliRunner().invoke(cli, [*name.split(), "--help"], terminal_width=100)
    assert result.exit_code == 0
    return " ".join(result.output.split())


def listener_imports(path: Path) -> set[str]:
    """The modules of the listener that a module imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "listener":
            found |= {alias.name for alias in node.names} & MODULES.keys()
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.removeprefix("listener.")} & MODULES.keys()
    return found


@cache
def strings_of_the_source() -> list[str]:
    """Every string in listener/, with … where a value is put in."""
    found = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                ]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


# --- settings ------------------------------------------------------------------------------------


def test_the_readme_lists_every_setting_with_its_default_and_meaning() -> None:
    """The table is the class, row by row."""
    expected = [
        [f"`{name}`", f"`{default_of(spec)}`" if default_of(spec) else "empty", meaning_of(spec)]
        for name, spec in SETTINGS.items()
    ]

    assert table(README, "Variable") == expected


def test_the_example_environment_lists_every_setting_commented_out() -> None:
    """Copied as it is, it changes nothing; each line comes after its meaning."""
    text = (ROOT / ".env.example").read_text("utf-8")

    found = re.findall(r"^# (.*)\n# ([A-Z_]+)=(.*)$", text, re.MULTILINE)

    expected = [(meaning_of(spec), name, default_of(spec)) for name, spec in SETTINGS.items()]
    assert found == expected
    assert all(line.startswith("#") for line in text.splitlines() if line)


def test_a_default_read_from_the_environment_is_the_default() -> None:
    """What the documents write can be set."""
    written = {
        name: default_of(spec)
        for name, spec in SETTINGS.items()
        if name not in {"DEMO_DIR", "MODEL_CACHE"}
    }

    assert Settings.from_environment(written) == Settings()


# --- commands ------------------------------------------------------------------------------------


def test_the_readme_lists_every_command_and_no_other() -> None:
    """A row a command."""
    listed = {row[0].strip("`").removeprefix("listener ") for row in table(README, "Command")}

    assert listed == COMMANDS.keys()


def test_the_readme_names_only_commands_and_options_that_exist() -> None:
    """What a reader types is understood."""
    name = "([a-z]+(?: fetch| convert)?)"
    typed = re.findall(
        rf"^(?:\S*/)?listener {name}(.*)$|`listener {name}([^`]*)`",
        README,
        re.MULTILINE,
    )

    assert len(typed) > 10
    for one, rest, other, inner in typed:
        command = COMMANDS[one or other]
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", (rest + inner).split("#")[0])) <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_settings_that_the_command_reads(name: str) -> None:
    """Each with its meaning, and none that doesn't exist."""
    source = inspect.getsource(inspect.unwrap(COMMANDS[name].callback or (lambda: None)))
    read = {
        variable for call, variable in READS.items() if re.search(rf"\b{re.escape(call)}", source)
    }

    text = help_of(name)

    assert read <= set(re.findall(r"\b[A-Z][A-Z_]+\b", text))
    for setting in COMMANDS[name].settings:  # type: ignore[attr-defined]
        assert f"{setting.upper()} {meaning_of(SETTINGS[setting.upper()])}" in text


@pytest.mark.parametrize("call", READS)
def test_some_command_has_the_call_that_tells_what_it_reads(call: str) -> None:
    """Renamed, it would be looked for in vain."""
    sources = [
        inspect.getsource(inspect.unwrap(one.callback)) for one in COMMANDS.values() if one.callback
    ]

    assert any(re.search(rf"\b{re.escape(call)}", source) for source in sources)


def test_every_setting_is_named_by_the_help_of_some_command() -> None:
    """A setting that nobody reads is not a setting."""
    texts = [help_of(name) for name in COMMANDS]

    unnamed = [name for name in SETTINGS if not any(re.search(rf"\b{name}\b", t) for t in texts)]

    assert unnamed == []


# --- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [row[0].strip("`") for row in table(README, "Message")])
def test_a_message_in_the_readme_is_one_that_the_code_prints(message: str) -> None:
    """Who searches for what the screen says must find it; … stands for what varies."""
    pattern = ".*".join(re.escape(part) for part in message.split("…"))

    assert any(re.search(pattern, string, re.DOTALL) for string in strings_of_the_source())


def test_the_sql_of_the_readme_runs(database: Database) -> None:
    """Each, as it stands there; test_install has that for after an uninstall, test_supabase one."""
    blocks = re.findall(r"^```sql\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    elsewhere = ("begin;", "create or replace function public.match_events(")
    statements = [block for block in blocks if not block.startswith(elsewhere)]

    for statement in statements:
        database.conn.execute(statement.encode())

    assert len(statements) == len(blocks) - len(elsewhere) >= 5


def test_links_in_the_documents_lead_somewhere() -> None:
    """To a file of the repository, or to a heading."""
    for page in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "systemd" / "README.md"):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
            file, _, anchor = target.partition("#")
            goal = page.parent / file if file else page
            assert goal.exists(), target
            headings = re.findall(r"^#+ (.*)$", goal.read_text("utf-8"), re.MULTILINE)
            assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, target


def test_the_architecture_page_names_every_module() -> None:
    """In its table, and none that doesn't exist."""
    assert set(listed_modules()) == MODULES.keys() - {"__init__", "__main__"}


# --- structure -----------------------------------------------------------------------------------


def test_imports_go_one_way() -> None:
    """From the bottom of the architecture page's table to its top."""
    place = {module: number for number, module in enumerate(["__init__", *listed_modules()])}

    wrong = [
        f"{module} imports {imported}"
        for module in listed_modules()
        for imported in listener_imports(MODULES[module])
        if place[imported] >= place[module]
    ]

    assert wrong == []


def test_no_statement_waits_for_a_row_that_somebody_holds() -> None:
    """Each that locks rows skips those that are locked."""
    locks = [
        (name, lock)
        for name, statement in vars(queries).items()
        if isinstance(statement, str)
        for lock in re.findall(r"(?m)^ *(for (?:no key )?(?:update|key share)\b.*)$", statement)
    ]

    assert len(locks) > 9
    assert [(name, lock) for name, lock in locks if not lock.endswith("skip locked")] == []


def test_a_long_module_has_a_reason() -> None:
    """Over 300 lines is two files, unless it is listed above."""
    long = {
        module
        for module, path in MODULES.items()
        if len(path.read_text("utf-8").splitlines()) > LONGEST_MODULE
    }

    assert long <= LONGER_FOR_A_REASON.keys()


# --- package -------------------------------------------------------------------------------------


def test_the_wheel_works_without_the_clone(tmp_path: Path) -> None:
    """It carries the SQL, and reads it from there."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", str(ROOT)]
    # Without the build backend beside it, pip fetches one.
    build += ["--no-build-isolation"] if find_spec("hatchling") else []
    subprocess.run([*build, "-w", tmp_path], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*install, site, wheel], check=True, capture_output=True)
    empty.mkdir()

    code = (
        "import listener; print(listener.__file__)\n"
        "from listener.template import sql_files, sql_text\n"
        "print(*sql_files()); sql_text('demo.sql'); sql_text('900_uninstall.sql')"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()

    assert Path(shown[0]).is_relative_to(site)
    assert shown[1:] == sql_files()


def test_the_settings_that_the_text_is_made_under_are_listed(database: Database) -> None:
    """Who writes an embedding_input has to set the same."""
    settings = database.value(
        "select proconfig from pg_proc where oid = 'listener.embedding_input'::regproc"
    )
    names = {setting.partition("=")[0] for setting in settings} - {"search_path"}
    sentence = README.partition("The generated function sets ")[2].partition(" for itself")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == {name.lower() for name in names}
