"""What is wrong with a command line or a configuration's file: one message, no stack trace."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from spiral_jax.core import command

SMALL = "from configs import tiny\ndef get_config():\n    c = tiny.get_config()\n"


@pytest.fixture
def parse(monkeypatch):
    """(arguments...) -> what `parse_flags` ends the process with; a message or a code."""

    def parsed(*arguments):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file(
            "config", None, "a file", flag_values=values, lock_config=True
        )
        flags.DEFINE_integer("number", 1, "of things", flag_values=values)
        flags.DEFINE_string("needed", None, "where", flag_values=values, required=True)
        monkeypatch.setattr(command.flags, "FLAGS", values)
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the file before it
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.parse_flags(sys.argv)
            sys.exit(values)
        return ended.value.code

    return parsed


FILES = {
    "does not parse": ("def get_config(:\n", ["line 1", "invalid syntax"]),
    "does not import": ("import os\nimport no_such\n", ["line 2", "No module named 'no_such'"]),
    "raises": ("def get_config():\n    return {}['x']\n", ["line 2", "KeyError"]),
    "has no function": ("c = 1\n", ["get_config"]),
    "gives something else": ("def get_config():\n    return 7\n", ["get_config returned 7"]),
    "gives nothing": ("def get_config():\n    pass\n", ["get_config returned None"]),
    "assigns to a key of an empty dict": (
        f"{SMALL}    c.task.generator_args.max_numbers = 4\n    return c\n",
        ["line 4", "max_numbers", "dict"],
    ),
    "misspells": (f"{SMALL}    c.search.trace = 4\n    return c\n", ["line 4", '"traces"']),
    "is of another room": (f"{SMALL}    c.train.lr = 4\n    return c\n", ["optimizer.lr"]),
    "has no such room": (f"{SMALL}    c.serach.traces = 4\n    return c\n", ["line 4", '"search"']),
    "is of another kind": (
        f"{SMALL}    c.train.steps = 'many'\n    return c\n",
        ["line 4", "steps = many", "int", "str"],
    ),
    "is no tuple": (
        f"{SMALL}    c.batch.search_lengths = 5\n    return c\n",
        ["search_lengths = 5", "tuple"],
    ),
    "has a dotted name": (
        f"{SMALL}    c.task.rewards = {{'code-v1.5': 'math'}}\n    return c\n",
        ["line 4", "'code-v1.5'", "ConfigDict({...}, allow_dotted_keys=True)"],
    ),
    "has slots": (
        f"{SMALL}    c.sampling.classes = ((4, 8, 16, 26),)\n    return c\n",
        ["line 4", "sampling.memory", "sampling.rows"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_config_file_is_named_with_the_line_and_what_is_wrong(name, parse, tmp_path):
    text, parts = FILES[name]
    file = tmp_path / "mine.py"
    file.write_text(text)
    message = parse(f"--config={file}", "--needed=x")
    assert message.startswith(f"error: --config={file}") and "Traceback" not in message
    assert all(part in message for part in parts), message
    assert message.count("\n") == 0


def test_a_config_file_that_is_missing_or_in_utf_16_is_named(parse, tmp_path):
    file = tmp_path / "mine.py"
    for more in ([], ["--config.train.steps=3"]):
        assert f"--config={file}: no such file" in parse("--config", str(file), *more)
    file.write_text(SMALL + "    return c\n", encoding="utf-16")
    assert "UTF-16" in parse(f"--config={file}", "--needed=x")


OVERRIDES = {
    "--config.search.trace=4": 'Did you mean "traces"',
    "--config.optimzer.lr=4": 'Did you mean "optimizer"',
    "--config.train.lr=4": "Did you mean optimizer.lr",
    "--config.sampling.classes=((4, 8, 16, 26),)": "sampling.memory",
    "--config.sampling.temperature=0.7": "search.temperature and aggregation.temperature",
    "--config.eval.temperature=0": "eval.search_temperature",
    "--config.search.xyz=4": "There are max_tokens, temperature, traces",
    "--config.train.steps=many": "'many'",
    "--config.search.traces.x=4": "search.traces.x",
    "--numbr=3": "number",
    "--number=x": "number=x",
    "--config.task.rewards={'code-v1.5': 'math'}": "allow_dotted_keys=True",
}


@pytest.mark.parametrize("flag", OVERRIDES)
def test_a_flag_that_cannot_be_is_named_and_the_nearest_one_too(flag, parse):
    message = parse("--config=configs/tiny.py", "--needed=x", flag)
    assert message.startswith("error: ") and "Traceback" not in message
    assert OVERRIDES[flag] in message, message


def test_a_missing_flag_is_named(parse):
    assert parse("--config=configs/tiny.py").startswith("error: --needed is missing: where")


def test_what_is_right_is_parsed(parse):
    arguments = ("--config=configs/tiny.py", "--needed=x", "--config.train.steps=3", "--number=2")
    values = parse(*arguments)
    assert values.config.train.steps == 3 and values.number == 2


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_ends_well_and_says_where_the_fields_are(flag, parse, capsys):
    assert parse(flag) == 0
    assert command.config.__file__ in capsys.readouterr().out
