"""The command line every package has: parsing, exit codes, one error line."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from effml_common.cli import Command, main
from effml_common.errors import ConfigError, InputError, Interrupted, NonFiniteError
from effml_common.parsing import dump_config, parse, require, setting


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a test command."""

    model: str = field(metadata={"help": "model directory"})
    files: tuple[str, ...] = field(metadata={"help": "text files"})
    group_size: int | None = field(default=128, metadata={"help": "columns per scale"})
    rate: float = field(default=1e-3, metadata={"help": "learning rate"})
    mode: Literal["fast", "exact"] = field(default="fast", metadata={"help": "which way"})
    sym: bool = field(default=True, metadata={"help": "no zero point"})
    fail: str = field(default="", metadata={"help": "what to raise"})

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ConfigError(f"rate must be positive, got {self.rate}; try 1e-3")


class Result:
    exit_code = 0

    def __init__(self, config: Settings) -> None:
        self.config = config

    def to_json(self) -> dict[str, Any]:
        return {"model": self.config.model}

    def __rich__(self) -> str:
        return f"model {self.config.model}"


ERRORS = {
    "input": InputError("bad file; fix it"),
    "nan": NonFiniteError("loss is nan at step 3; lower the rate"),
    "term": Interrupted(15),
    "int": KeyboardInterrupt(),
    "disk": OSError(28, "No space left on device", "out/file"),
    "missing": FileNotFoundError(2, "No such file or directory", "there.txt"),
}


def run(config: Settings) -> Result:
    if config.fail:
        raise ERRORS[config.fail]
    return Result(config)


COMMANDS = (
    Command(
        "go",
        "do it",
        config=f"{__name__}:Settings",
        run=f"{__name__}:run",
        examples=("tool go m --files a", "tool go m --files a b --json"),
    ),
)


@pytest.fixture(autouse=True)
def importable(monkeypatch) -> None:
    # importlib mode does not register test modules under a name that can be imported.
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())


def _this_module():
    import types

    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    return module


def settings(*argv: str) -> Settings:
    return parse(Settings, argv, prog="tool go")


def test_flags_lists_and_positionals() -> None:
    got = settings("m", "--files", "a", "b", "--group-size", "64", "--no-sym", "--rate=0.5")
    assert got == Settings(model="m", files=("a", "b"), group_size=64, sym=False, rate=0.5)
    assert settings(
        "--files", "a", "--mode", "exact", "--group-size", "none", "--", "m"
    ) == Settings(model="m", files=("a",), mode="exact", group_size=None)


@pytest.mark.parametrize(
    "argv",
    [
        ["m"],
        ["--files", "a"],
        ["m", "--files", "a", "--rate", "fast"],
        ["m", "--files", "a", "--mode", "slow"],
        ["m", "--files", "a", "--rate", "-1"],
        ["m", "--files", "a", "--rates-of-change", "1"],
        ["m", "--files", "a", "--config", "nowhere.yaml"],
        ["m", "--files", "a", "--group-size", "1.5"],
    ],
)
def test_bad_flags_are_one_line_with_a_remedy(argv) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(*argv)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


def test_unknown_key_in_a_file_is_named(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nfiles: [a]\ngroup_sise: 64\n")
    with pytest.raises(ConfigError, match="group_sise"):
        settings("--config", str(path))


def test_dumped_config_loads_back_and_flags_win(tmp_path) -> None:
    config = Settings(model="none", files=("a", "1"), group_size=None, rate=2.5e-5, sym=False)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert settings("--config", str(path)) == config
    assert settings("--config", str(path), "--rate", "1").rate == 1


@pytest.mark.parametrize(
    ("fail", "code"),
    [("", 0), ("input", 2), ("nan", 3), ("term", 143), ("int", 130), ("disk", 2), ("missing", 2)],
)
def test_exit_codes_and_the_one_error_line(fail, code, capsys) -> None:
    assert (
        main("tool", "effml-common", COMMANDS, ["go", "m", "--files", "a", "--fail", fail]) == code
    )
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if code in (2, 3):
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        assert ";" in line
    if fail == "missing":
        assert "there.txt" in captured.err


def test_json_prints_the_result_alone(capsys) -> None:
    assert main("tool", "effml-common", COMMANDS, ["go", "m", "--files", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "m"}
    assert main("tool", "effml-common", COMMANDS, ["go", "m", "--files", "a"]) == 0
    assert capsys.readouterr().out == "model m\n"


def test_debug_shows_the_traceback(capsys) -> None:
    argv = ["go", "m", "--files", "a", "--fail", "input", "--debug"]
    assert main("tool", "effml-common", COMMANDS, argv) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_shows_defaults_and_both_examples(capsys) -> None:
    assert main("tool", "effml-common", COMMANDS, ["go", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("columns per scale", "128", *COMMANDS[0].examples, "--json", "--debug", "--quiet"):
        assert part in text
    assert main("tool", "effml-common", COMMANDS, ["--help"]) == 0
    assert "do it" in capsys.readouterr().out


def test_version_is_the_distributions(capsys) -> None:
    assert main("tool", "effml-common", COMMANDS, ["--version"]) == 0
    assert "0.1.0" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys) -> None:
    assert main("tool", "effml-common", COMMANDS, ["gone"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def assert_well_behaved(line: list[str], capsys) -> int:
    code = main("tool", "effml-common", COMMANDS, line)
    captured = capsys.readouterr()
    assert code in (0, 2), line
    assert "Traceback" not in captured.err, line
    if code == 2:
        assert re.search(r"^error: .+; .+\n\Z", captured.err, re.MULTILINE), (line, captured.err)
        assert captured.out == "", line
    return code


@pytest.mark.parametrize("lines", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_command_lines_never_crash(lines, capsys, tmp_path) -> None:
    draw = random.Random(0)
    words = [
        *("m", "a", "--files", "--group-size", "none", "64", "-1", "1e400", "nan", "--rate", "0.5"),
        *("--mode", "fast", "slow", "--sym", "--no-sym", "--config", "", "--", "[", "{a: 1}", "\0"),
        *("--json", "--quiet", "=", "--rate=", "--files=[]", "é", "--unknown", "null", "-h", "-x"),
    ]
    config = tmp_path / "c.yaml"
    for _ in range(lines):
        config.write_bytes(draw.randbytes(draw.randrange(30)))
        line = [draw.choice([*words, str(config)]) for _ in range(draw.randrange(8))]
        assert_well_behaved(["go", *line], capsys)


YAML = b"model: m\nfiles: [a, b]\ngroup_size: 64\nrate: 0.5\nmode: exact\nsym: no\n"


def mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(0, 3)):
        place = draw.randrange(len(changed))
        changed[place : place + draw.randint(0, 4)] = draw.randbytes(draw.randint(1, 2))
    return bytes(changed)


@pytest.mark.slow
def test_a_thousand_mutations_of_a_good_file_and_line_never_crash(capsys, tmp_path) -> None:
    draw, config = random.Random(1), tmp_path / "c.yaml"
    good = ["go", "--config", str(config), "--rate=0.25", "--files", "c", "--no-sym"]
    codes = []
    for number in range(1000):
        line = list(good)
        config.write_bytes(YAML if number % 2 else mutated(YAML, draw))
        if number % 2:
            place = draw.randrange(1, len(line))
            change = mutated(line[place].encode(), draw).decode("utf-8", "surrogateescape")
            line[place : place + 1] = draw.choice([[], [change], [change, line[place]]])
        codes.append(assert_well_behaved(line, capsys))
    assert set(codes) == {0, 2}


def test_command_line_imports_no_torch() -> None:
    code = (
        "import sys, effml_common, effml_common.cli as c, effml_common.errors\n"
        "c.main('tool', 'effml-common', (), ['--help'])\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_common_flags_stand_anywhere_and_an_error_leaves_stdout_empty(capsys) -> None:
    for line in (["--json", "go", "m", "--files", "a"], ["go", "--json", "m", "--files", "a"]):
        assert main("tool", "effml-common", COMMANDS, line) == 0
        assert json.loads(capsys.readouterr().out) == {"model": "m"}
    assert main("tool", "effml-common", COMMANDS, ["go", "--json"]) == 2
    assert capsys.readouterr().out == ""


@dataclass(frozen=True, kw_only=True)
class Everything:
    """All kinds of fields."""

    name: str = field(metadata={"help": "a required word, 95 % of the time"})
    count: int = field(metadata={"help": "a required number"})
    texts: list[str] = field(default_factory=list, metadata={"help": "words"})
    bits: tuple[int, ...] = field(default=(4, 3), metadata={"help": "numbers"})
    scale: float | None = field(default=None, metadata={"help": "may be none"})
    out: str | None = field(default=None, metadata={"help": "may be none"})
    options: dict[str, float] = field(default_factory=dict, metadata={"help": "a mapping"})
    where: Path = field(default=Path("here"), metadata={"help": "a path"})
    use_it: bool = field(default=False, metadata={"help": "a switch"})


def everything(*words: str) -> Everything:
    return parse(Everything, words, prog="tool all")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bits", "2", "-1"], {"bits": (2, -1)}),
        (["--bits", "2", "--bits", "3"], {"bits": (2, 3)}),
        (["--bits=[5, 6]"], {"bits": (5, 6)}),
        (["--bits"], {"bits": ()}),
        (["--texts", "1", "null", "a b", "x=y"], {"texts": ["1", "null", "a b", "x=y"]}),
        (["--scale", "-1e-3"], {"scale": -1e-3}),
        (["--scale", "none", "--out", "null"], {}),
        (["--out", "none"], {}),
        (["--out", "12"], {"out": "12"}),
        (["--options", '{"a": 1, "b": 2.5}'], {"options": {"a": 1.0, "b": 2.5}}),
        (["--options", "{a: 1}"], {"options": {"a": 1.0}}),
        (["--where", "a/b"], {"where": Path("a/b")}),
        (["--use_it"], {"use_it": True}),
        (["--use-it", "--no-use-it"], {}),
    ],
    ids=" ".join,
)
def test_every_kind_of_field_is_read(words, expected) -> None:
    assert everything("n", "3", *words) == Everything(name="n", count=3, **expected)


def test_required_scalars_are_positional_in_their_order_and_help_names_types(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        everything("--help")
    assert not stopped.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "95 % of the time" in text
    assert "may be none (type: float or none, default: null)" in text
    assert "numbers (type: list of int, default: (4, 3))" in text
    assert text.index(" name a required word") < text.index(" count a required number")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scal", "1"], "there is no flag --scal; did you mean --scale?"),
        (["--name", "n"], "--name is no flag; write its value at its place (see tool all --help)"),
        (["--use-it=yes"], "ignored explicit argument 'yes'; see tool all --help"),
        (["--scale", "much"], "Given value: much; see tool all --help"),
        (["--bits", "2", "x"], "Got value: x; see tool all --help"),
        (["extra"], "unrecognized arguments: extra; see tool all --help"),
        (["--config", "/nowhere.yaml"], "'/nowhere.yaml'; see tool all --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_message_says_what_and_what_to_do(words, told) -> None:
    with pytest.raises(ConfigError) as caught:
        everything("n", "3", *words)
    assert str(caught.value).endswith(told)


@pytest.mark.parametrize(
    "yaml",
    ["", "[1]", "bits: 3", "bits: {a: 1}", "use_it: 3", "1: 2", "\t", "name: [", "config: other"],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, yaml) -> None:
    (tmp_path / "c.yaml").write_text(yaml)
    with pytest.raises(ConfigError, match=r"^[^\n]+; [^\n]+$"):
        everything("n", "3", "--config", str(tmp_path / "c.yaml"))


def test_flags_win_over_the_file_wherever_it_stands(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("name: f\ncount: 9\nbits: [8]\nscale: none\nuse_it: true\n")
    file = ["--config", str(tmp_path / "c.yaml")]
    assert everything(*file) == Everything(name="f", count=9, bits=(8,), use_it=True)
    mixed = everything("--bits", "2", "--scale", "1", *file)
    assert mixed == Everything(name="f", count=9, bits=(2,), scale=1.0, use_it=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Count."""

    count: int = setting(3, "how many")

    def __post_init__(self) -> None:
        require(self.count > 0, f"count must be 1 or more, got {self.count}", "use 3")


def test_a_setting_has_its_default_and_shows_its_help(capsys) -> None:
    assert parse(Count, [], prog="x") == Count(count=3)
    with pytest.raises(SystemExit):
        parse(Count, ["--help"], prog="x")
    assert "how many" in capsys.readouterr().out


@dataclass
class Grouped:
    first: int = setting(1, "of the group", group="rarely needed")
    second: int = setting(2, "of none")


def test_settings_of_a_group_stand_below_its_heading(capsys) -> None:
    assert parse(Grouped, ["--first", "5"], prog="x") == Grouped(first=5)
    with pytest.raises(SystemExit):
        parse(Grouped, ["--help"], prog="x")
    shown = capsys.readouterr().out
    assert (
        shown.index("--second SECOND  ")
        < shown.index("rarely needed:")
        < shown.index("of the group")
    )


def test_a_refused_setting_says_what_is_wrong_and_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"^count must be 1 or more, got 0; use 3$"):
        parse(Count, ["--count", "0"], prog="x")


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
tricky = st.sampled_from(["1e-3", "null", "yes", "0x1", "~", "1_0", "1:2", ".5", "- a", "#"])
floats = st.floats(allow_nan=False)


@pytest.mark.filterwarnings("default")
@settings_of_hypothesis(max_examples=60, deadline=None, database=None)
@given(
    name=texts,
    count=st.integers(),
    texts=st.lists(texts | tricky),
    bits=st.lists(st.integers()).map(tuple),
    scale=st.none() | floats,
    # Not the words for None, which stand for it even in quotes.
    out=st.none() | st.sampled_from(["1e-3", "yes", "", "0x1", "none of these", "- a"]),
    options=st.dictionaries(texts, floats, max_size=3),
)
def test_any_config_loads_back_equal(tmp_path_factory, **values) -> None:
    config = Everything(**values)
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert everything("--config", str(path)) == config


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "a/b: permission denied; check its"),
        (IsADirectoryError(21, "Is a directory", "a"), "a: is a directory; check the path"),
        (OSError(28, "No space left on device"), "no space left on device; free some space"),
        (OSError(30, "Read-only file system", "c"), "c: read-only file system; check its"),
        (OSError(27, "File too large", "d"), "d: file too large; raise the limit (ulimit -f)"),
        (OSError(5, "Input/output error", "e"), "e: input/output error; check the disk"),
        (
            OSError(40, "Too many levels", "f"),
            "f: too many levels of symbolic links; check the path",
        ),
    ],
    ids=["permission", "folder", "full", "read-only", "too large", "broken disk", "loop"],
)
def test_errors_of_the_file_system_name_the_path(error, told, capsys, monkeypatch) -> None:
    monkeypatch.setitem(ERRORS, "disk", error)
    assert main("tool", "effml-common", COMMANDS, ["go", "m", "--files", "a", "--fail=disk"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch) -> None:
    for error in (KeyError("x"), OSError("odd"), ConnectionResetError(104, "reset")):
        monkeypatch.setitem(ERRORS, "bug", error)
        with pytest.raises(type(error)):
            main("tool", "effml-common", COMMANDS, ["go", "m", "--files", "a", "--fail", "bug"])


LOOP = """
import time
from dataclasses import dataclass
from effml_common.cli import Command, main
from effml_common.stopping import StopSignal

@dataclass(frozen=True, kw_only=True)
class Config:
    "Nothing."

def run(config):
    with StopSignal() as stop:
        print("looping", flush=True)
        while True:
            time.sleep(0.01)
            if stop.requested:
                print("saved", flush=True)
            stop.check()

command = Command("loop", "loop", config="__main__:Config", run="__main__:run")
raise SystemExit(main("tool", "effml-common", [command]))
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_process_after_its_save(signum, code) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOOP, "loop"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr.readline() == "looping\n"  # stdout is kept for results
        start = time.monotonic()
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - start < 5
    assert out == ""
    assert "saved\n" in err
    assert err.splitlines()[-1].startswith("error: interrupted by SIG")


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = (
        "import sys\nfrom effml_common.cli import Command, main\n"
        "commands = [Command(f'c{n}', 'help ' * 50, 'a:b', 'a:b') for n in range(5000)]\n"
        "sys.stdin.read()\n"
        "raise SystemExit(main('tool', 'effml-common', commands, ['--help']))"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=pipe
    ) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0
