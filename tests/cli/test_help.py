"""``--help``: the page of commands is short and true, and every command lists its options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gvsl_lightning.cli.help import PAGE
from gvsl_lightning.cli.main import COMMANDS, main


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Text of a command that prints and ends with status 0."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_page_fits_on_a_screen_and_lists_all_commands(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(words)
    page = capsys.readouterr().out
    assert len(page.splitlines()) <= 45
    assert max(map(len, page.splitlines())) <= 100
    assert sorted(re.findall(r"^  (\w+) +[A-Z].*\.$", page, flags=re.MULTILINE)) == sorted(COMMANDS)


def test_the_examples_of_the_page_are_parsed_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = PAGE.partition("Examples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    examples = [shlex.split(line)[1:] for line in lines.splitlines()]
    assert len(examples) == 4
    for words in examples:
        if words[0] == "predict":  # its checkpoint brings the classes
            continue
        assert "class_path" in printed([*words, "--print_config"], capsys)


def test_the_options_of_the_page_exist(capsys: pytest.CaptureFixture[str]) -> None:
    listed = printed(["fit", "--help"], capsys)
    named = set(re.findall(r"^  --([\w.]+)", PAGE, flags=re.MULTILINE))
    classes = {"data.root", "model.weights", "model.help", "debug"}
    assert classes < named
    assert [name for name in named - classes if f"--{name}" not in listed] == []
    assert "--model.weight_smoothness" in printed(["fit", "--model.help=GVSL"], capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = {"export": "--format", "features": "--weights", "reproduce": "--tolerance"}
    assert option.get(command, "--config") in printed([command, "--help"], capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [(["fti"], "fit"), (["prepar", "--help"], "prepare"), (["--seed_everything=1"], "--help")],
)
def test_a_wrong_command(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_the_page_needs_no_heavy_import() -> None:
    code = (
        "import sys; sys.argv = ['gvsl', '--help']\n"
        "from gvsl_lightning.__main__ import run; run()\n"
        "print(*[name for name in ('torch', 'monai', 'numpy') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed == f"{PAGE}\n\n"
