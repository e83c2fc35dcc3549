"""`polar sql`: people asking the lake. It only reads, whatever it is given.

What is refused, and the prompt, are here; how rows are written is in `sql_rows.py`, options and
exit codes in `cli.py`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import duckdb

from assets.sql_rows import WRITERS
from pipelines.attach import connect, fault, interruptible, quoted, scratch
from pipelines.errors import PolarError, QueryError
from pipelines.schemas import TABLES
from pipelines.views import VIEWS

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output


# A read-only attach lets these functions touch files before it refuses their commit, or lets
# them run text that the check below cannot see.
_FORBIDDEN = re.compile(
    r"(ducklake_)?(merge_adjacent_files|rewrite_data_files|expire_snapshots|cleanup_old_files"
    r"|delete_orphaned_files|set_option|set_commit_message|flush_inlined_data|add_data_files"
    r"|commit)|query|json_execute_serialized_sql|sqlite_\w+|(force_)?checkpoint"
    r"|(en|dis)able_\w+",
    re.IGNORECASE,
)

_WORD = re.compile(rb'"(?:[^"]|"")*"|[\w$\x80-\xff]+|[^\s]')


def run_query(
    home: Path,
    query: str,
    format: str = "table",  # noqa: A002 - the option's name
    snapshot: int | None = None,
    output: Path | None = None,
    *,
    stream: TextIO | None = None,
) -> None:
    """Run one query (several, for tables) and write its rows to `output`, else to `stream`.

    `stream` is standard output unless given; Parquet goes to its `buffer`. `output` appears when
    it is complete.

    Raises:
        QueryError: the query is wrong, would write, or cannot be written in this format.
        LakeError: there is no lake or no such snapshot.
    """
    stream = stream or sys.stdout
    if output is not None and output.is_dir():
        msg = f"{output} is a folder; give the name of a file"
        raise QueryError(msg)
    if format not in WRITERS:
        msg = f"unknown format {format!r}; there are {', '.join(WRITERS)}"
        raise QueryError(msg)
    if format == "parquet" and output is None and stream.isatty():
        msg = "Parquet is not for a terminal: add --output FILE, or send it to a file or a pipe"
        raise QueryError(msg)
    with _sandbox(home, snapshot) as con:
        statements = _readable(con, query)
        if format != "table" and len(statements) != 1:
            msg = f"{format} holds the rows of one query, {len(statements)} were given"
            raise QueryError(msg)
        if output is None:
            try:
                _answer(con, statements, format, home, stream)
                stream.flush()
            except BrokenPipeError:  # `| head` has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return
        part = output.with_name(f".{output.name}.{os.getpid()}.part")
        try:
            with part.open("w", encoding="utf-8", newline="") as file:
                _answer(con, statements, format, home, file)
            part.replace(output)
        except OSError as error:
            msg = f"{output}: cannot be written: {error.strerror}; give another --output"
            raise QueryError(msg) from error
        finally:
            part.unlink(missing_ok=True)


def prompt(
    home: Path,
    snapshot: int | None = None,
    *,
    stream: TextIO | None = None,
    keys: Input | None = None,
    screen: Output | None = None,
) -> None:
    """Ask for queries until Ctrl-D; a query ends with `;`. History is kept under `home`.

    Without a terminal, standard input is run as the query. `keys` and `screen` stand in for the
    terminal in tests.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.lexers import PygmentsLexer
    from pygments.lexers.sql import SqlLexer

    stream = stream or sys.stdout
    if keys is None and not sys.stdin.isatty():
        run_query(home, sys.stdin.read(), snapshot=snapshot, stream=stream)
        return
    columns = {column.name for table in TABLES.values() for column in table.columns}
    columns.update(column for view in VIEWS.values() for column in view.columns)
    with _sandbox(home, snapshot) as con:
        session: PromptSession[str] = PromptSession(
            history=FileHistory(str(home / "sql_history"))
            if os.access(home, os.W_OK)
            else InMemoryHistory(),
            lexer=PygmentsLexer(SqlLexer),
            completer=WordCompleter([*TABLES, *VIEWS, *sorted(columns)], ignore_case=True),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation="    ~ ",
            key_bindings=_enter_at_semicolon(),
            input=keys,
            output=screen,
        )
        print(f"tables: {', '.join(TABLES)}\nviews:  {', '.join(VIEWS)}", file=stream)
        print("A query ends with ;   Tab completes   Ctrl-D leaves", file=stream)
        while True:
            try:
                query = session.prompt("lake> ")
                if query.strip(" ;\n") in ("exit", "quit"):
                    return
                _answer(con, _readable(con, query), "table", home, stream)
            except EOFError:
                return
            except KeyboardInterrupt:
                print("interrupted", file=stream)
            except PolarError as error:
                print(error, file=stream)


def _enter_at_semicolon() -> Any:
    """Enter sends the input when it is complete, else begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        typed = event.current_buffer.text.strip()
        if not typed or typed.endswith(";") or typed in ("exit", "quit"):
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.insert_text("\n")

    return bindings


@contextmanager
def _sandbox(home: Path, snapshot: int | None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that can read the lake's files and nothing else, and cannot be unlocked."""
    con = connect(home, read_only=True, snapshot=snapshot)
    try:
        readable = ", ".join(
            quoted(f"{path}/") for path in (home.absolute() / "lake", scratch(con))
        )
        con.execute(f"set allowed_directories = [{readable}]")
        con.execute("set enable_external_access = false")
        con.execute("set lock_configuration = true")
        yield con
    finally:
        con.close()


def _readable(con: duckdb.DuckDBPyConnection, query: str) -> list[duckdb.Statement]:
    """The statements of `query`, if all of them only read; DuckDB's parser says what they are."""
    try:
        statements = con.extract_statements(query)
    except duckdb.Error as error:
        raise QueryError(str(error)) from None
    if not statements:
        msg = "there is no query; try: from pool_overview"
        raise QueryError(msg)
    for statement in statements:
        kind = statement.type
        if kind == duckdb.StatementType.EXPLAIN:  # EXPLAIN ANALYZE runs what it explains
            kind = _explained(con, statement.query)
        if kind != duckdb.StatementType.SELECT:
            msg = (
                f"refused: {kind.name} is not reading, and `polar sql` only reads (SELECT, FROM, "
                "WITH, VALUES, SHOW, DESCRIBE, SUMMARIZE, EXPLAIN of these). "
                "To keep a result use --output FILE"
            )
            raise QueryError(msg)
        for name in _called(statement.query):
            if _FORBIDDEN.fullmatch(name):
                msg = f"refused: {name}() can change the lake, and `polar sql` only reads"
                raise QueryError(msg)
    return statements


def _tokens(query: str) -> list[tuple[str, int]]:
    """The words of a query as the parser sees them, each with its offset in bytes; no comments."""
    data = query.encode()
    tokens = []
    for at, kind in duckdb.tokenize(query):
        if kind != duckdb.token_type.comment and (word := _WORD.match(data, at)):
            tokens.append((word[0].decode(), at))
    return tokens


def _explained(con: duckdb.DuckDBPyConnection, query: str) -> duckdb.StatementType:
    """The type of what an EXPLAIN explains: what follows ANALYZE and options in brackets."""
    tokens = _tokens(query)[1:]
    if tokens and tokens[0][0].lower() == "analyze":
        tokens = tokens[1:]
    while tokens:
        with suppress(duckdb.Error):
            inside = con.extract_statements(query.encode()[tokens[0][1] :].decode())
            return max((s.type for s in inside), key=lambda t: t != duckdb.StatementType.SELECT)
        if tokens[0][0] != "(":
            break
        words = [word for word, _ in tokens]
        tokens = tokens[words.index(")") + 1 :]
    return duckdb.StatementType.EXPLAIN


def _called(query: str) -> list[str]:
    """Names of the functions that a query calls."""
    words = [word for word, _ in _tokens(query)]
    return [
        name.strip('"') for name, bracket in zip(words, words[1:], strict=False) if bracket == "("
    ]


def _answer(
    con: duckdb.DuckDBPyConnection,
    statements: Sequence[duckdb.Statement],
    format: str,  # noqa: A002
    home: Path,
    stream: TextIO,
) -> None:
    for statement in statements:
        try:
            with interruptible(con):
                con.execute(statement)
                WRITERS[format](con, stream)
        except duckdb.Error as error:
            raise fault(error, home, "answer", QueryError) from None
