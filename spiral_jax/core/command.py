"""How a command starts: its flags, its --help, and messages in place of stack traces."""

from __future__ import annotations

import difflib
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from spiral_jax.core import config
from spiral_jax.core.errors import UserError

_HELP = ("-h", "--help", "-help", "--helpshort")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
_CLOSE = 0.5  # of two names, as difflib measures it

# Fields of earlier versions, and what took their place.
_GONE = dict.fromkeys(
    ("classes", "row_counts", "exit_groups"),
    "Slots have become pages. Leave it out, or set sampling.memory and sampling.rows: lengths "
    "follow from the limits on prompts and traces.",
) | {
    "temperature": "Search and aggregation have one each: search.temperature and "
    "aggregation.temperature, in evaluations eval.search_temperature and "
    "eval.aggregation_temperature."
}


def run_command(main: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs `main` with the arguments that are left; ends the process.

    What is wrong with the command line or the configuration is one message and exit code 1; --help
    is exit code 0. A Ctrl-C that nobody handles is one line and exit code 130.
    """
    if "jax" in sys.modules:  # a report needs none
        from spiral_jax.core.distributed import skip_missing_tpu

        skip_missing_tpu()
    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises app.UsageError: words behind the command that belong to no flag."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")


def parse_flags(argv: list[str]) -> list[str]:
    """`flags_parser` of `app.run`; see `run_command`."""
    if any(argument in _HELP for argument in argv[1:]):
        print(_help_text(argv[0]))
        sys.exit(0)
    file = _config_file(argv)
    try:
        if file is not None:
            _check_file(file)
        rest = flags.FLAGS(argv)
        if file is not None:
            _check_config(file, flags.FLAGS["config"].value)
        return rest
    except UserError as error:
        message = str(error)
    except Exception as error:  # of absl, of the configuration's file, of ml_collections
        message = _message(argv, file, error)
    sys.exit(f"error: {message}")


def _message(argv: Sequence[str], file: pathlib.Path | None, error: Exception) -> str:
    """What is wrong with the command line, or with the file that --config names."""
    cause: BaseException | None = error
    while cause is not None and file is not None:  # absl and ml_collections wrap what a file raises
        if _line_of(file, cause) is not None or "attribute 'get_config'" in str(cause):
            return file_message(file, cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, flags.Error):
        if file is not None and "Flag --config must have a value" in str(error):
            return _not_a_config(file, None)  # absl says so of what get_config returned
        return _flag_message(error)
    return _override_message(argv, error)


def file_message(file: pathlib.Path, error: BaseException) -> str:
    """What is wrong with a configuration's file that raised `error`: file, line, and what to do."""
    if file.is_file():
        content = file.read_bytes()
        if content.startswith(_UTF_16) or b"\0" in content:
            return f"--config={file}: is in UTF-16, or no text. Save it as UTF-8."
    if isinstance(error, UserError):
        return f"--config={file}: {error}"
    line = _line_of(file, error)
    where = f"--config={file}" + (f", line {line}" if line else "")
    if dotted := _dotted_key(error):
        return f"{where}: {dotted}"
    if isinstance(error, SyntaxError):
        return f"{where}: {error.msg}."
    if isinstance(error, AttributeError | KeyError | TypeError):
        return f"{where}: {_field_message(error)}"
    return f"{where}: {type(error).__name__}: {error}"


def _line_of(file: pathlib.Path, error: BaseException) -> int | None:
    """The line of `file` in which an error came up; None: in none of its own."""
    if isinstance(error, SyntaxError) and error.filename:
        return error.lineno if pathlib.Path(error.filename).resolve() == file.resolve() else None
    if isinstance(error, SyntaxError | ValueError) and "null bytes" in str(error):
        return 1  # Python names no file then
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if pathlib.Path(f.filename).resolve() == file.resolve()]
    return lines[-1] if lines else None


def _field_message(error: BaseException) -> str:
    """What ml_collections, or Python, says of a field, in one line and with the nearest name."""
    said = error.args[0] if error.args else error
    if isinstance(said, Exception):
        said = said.args[0]
    text = " ".join(str(said).split())
    if match := re.match(r"Key \"(\w+)\" does not exist.*?Other fields present: \"{(.*)}", text):
        return _no_such_field(match[1], re.findall(r"'(\w+)':", match[2]))
    if match := re.match(r"Could not override field '(\w+)' \(reference\)\. (.*) is of .*", text):
        kinds = re.findall(r"<class '(?:\w+\.)*(\w+)'>", text)
        if len(kinds) == 2:
            return f"{match[1]} = {match[2]}: must be of type {kinds[1]}, this is {kinds[0]}."
    if "has no attribute 'get_config'" in text:
        return "has no function get_config, which returns a configuration: see configs/tiny.py."
    if match := re.match(r"'(\w+)' Did you mean \"(\w+)\"", text):
        return f'no such field: {match[1]}. Did you mean "{match[2]}"?'
    return f"{type(error).__name__}: {text}"


def _dotted_key(error: BaseException) -> str:
    """What to do about a key with a dot, which ml_collections refuses; "": that is not it."""
    match = re.search(r"ConfigDict does not accept dots .* key (.*) contains one", str(error))
    if match is None:
        return ""
    return (
        f"the key {match[1]!r} has a dot. In a configuration's file, write "
        "ConfigDict({...}, allow_dotted_keys=True) around the dict of task.rewards; other fields "
        "have no such keys."
    )


def _override_message(argv: Sequence[str], error: Exception) -> str:
    """The same of a flag --config.a.b=c."""
    for argument in argv:
        if match := re.match(r"--?(?:no)?config\.([\w.]+)", argument):
            room: Any = config.defaults()
            for name in match[1].split("."):
                if isinstance(room, ConfigDict) and name in room:
                    room = room[name]
                elif isinstance(room, ConfigDict) and str(error).find(name) >= 0:
                    return f"{argument}: {_no_such_field(name, room)}"
    return f"--config: {_field_message(error)}"


def _no_such_field(name: str, fields: Iterable[str]) -> str:
    """That a room has no such field, the nearest of those that it has, and rooms that have it."""
    near = difflib.get_close_matches(name, list(fields), n=1, cutoff=_CLOSE)
    text = f"no such field: {name}."
    if name in _GONE:
        return f"{text} {_GONE[name]}"
    if near:
        return f'{text} Did you mean "{near[0]}"?'
    elsewhere = [
        f"{room}.{name}"
        for room, of in config.defaults().items()
        if isinstance(of, Mapping | ConfigDict) and name in of
    ]
    if elsewhere:
        return f"{text} Did you mean {' or '.join(elsewhere)}?"
    if not fields:
        return f"{text} This field is a dict without keys: assign a whole one, {{{name!r}: ...}}."
    return f"{text} There are {', '.join(sorted(fields))}."


def _help_text(program: str) -> str:
    """What the command is for, its flags, and where the configuration's fields are."""
    own = [
        name
        for name in flags.FLAGS.flags_by_module_dict()
        if name == program or name.startswith("spiral_jax.")
    ]
    about = (sys.modules["__main__"].__doc__ or "").strip()
    parts = [about, "Flags:", *(flags.FLAGS.module_help(name).strip() for name in own)]
    if "config" in flags.FLAGS:
        parts.append(
            f"The fields of a --config, with their units and defaults, are in {config.__file__}. "
            "Each is a flag too, such as --config.train.steps=10."
        )
    return "\n\n".join(parts)


def _flag_message(error: flags.Error) -> str:
    text = " ".join(str(error).split())
    if dotted := _dotted_key(error):
        return f"{text.partition(': ConfigDict')[0]}: {dotted}"
    if match := re.search(r"[Ff]lag --(\w+)(=None| must have a value)", text):
        return f"--{match[1]} is missing: {flags.FLAGS[match[1]].help}. --help shows all flags."
    return f"{text.rstrip('.')}. --help shows all flags."


def _config_file(argv: Sequence[str]) -> pathlib.Path | None:
    """The file that --config names; None: there is no such flag."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            value = value if equals else "".join(argv[i + 1 : i + 2])
            return pathlib.Path(value.partition(":")[0])
    return None


def _check_file(file: pathlib.Path) -> None:
    """Makes what stands beside the file's folder importable: `from configs import tiny`.

    Raises:
      ConfigError: there is no such file.
    """
    if not file.is_file():
        raise config.ConfigError(
            f"--config={file}: no such file. Give one of configs/, or one of your own."
        )
    sys.path.append(str(file.resolve().parent.parent))  # commands run from any directory


def _check_config(file: pathlib.Path, value: Any) -> None:
    """Raises `ConfigError`: no configuration came of the file that --config names."""
    if not isinstance(value, ConfigDict | str):  # str: a study reads its file itself
        raise config.ConfigError(_not_a_config(file, value))


def _not_a_config(file: pathlib.Path, value: Any) -> str:
    return (
        f"--config={file}: its get_config returned {value!r}; it must return core.config's "
        "defaults() with what differs."
    )
