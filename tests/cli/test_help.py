"""The pages of ``--help``: short, and every option and example in them is real."""

import re
import shlex
from pathlib import Path

import pytest

from gvsl_lightning.cli.help import PAGES
from gvsl_lightning.cli.main import TOOLS, main

ROOT = Path(__file__).parents[2]
COMMANDS = [*PAGES, *TOOLS]


def page(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    main([*words, "--help"])
    return capsys.readouterr().out


def everything(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def examples(text: str) -> list[list[str]]:
    """Words of each example, without the program."""
    lines = text.partition("Examples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    return [shlex.split(line)[3:] for line in lines.splitlines()]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_page_fits_on_a_screen_and_has_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page(capsys, *command.split())
    lines = text.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    assert lines[0].endswith(".")
    assert 2 <= len(examples(text)) <= 4
    assert "--help=all" in text
    assert re.search(r"--debug +errors with a traceback", lines[-1 if command else -2])
    if command:
        assert all(words[0] == command for words in examples(text))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_page_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"--((?:trainer\.)?[a-z_]+)(?![\w.])", page(capsys, command)))
    listed = everything(capsys, command, "--help=all")
    assert len(named) > 3
    # `main` takes this one itself
    assert [name for name in named - {"debug"} if f"--{name}" not in listed] == []


@pytest.mark.parametrize("command", [*PAGES, "features"])
def test_the_examples_are_parsed(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for words in examples(page(capsys, command)):
        assert "root:" in everything(capsys, *words, "--print_config") or "quickstart" in words[2]


def test_nothing_is_wrong_in_the_examples_of_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for words in examples(page(capsys, "profile")):
        with pytest.raises(SystemExit):
            main([*words, "--siz=1"])  # what is wrong first is named
        assert capsys.readouterr().err.startswith("error: --siz ")


def test_the_examples_of_benchmark_are_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for words in examples(page(capsys, "benchmark")):
        out = words.index("--out") + 1
        main([*words[:out], str(tmp_path), *words[out + 1 :], "--print", "slurm"])
        assert "sbatch" in capsys.readouterr().out


def test_the_examples_of_prepare_lack_but_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for words in examples(page(capsys, "prepare")):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        root = next(word for word in words if word.startswith("--data.root=")).partition("=")[2]
        assert root in capsys.readouterr().err


def test_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = page(capsys)
    for command in COMMANDS:
        sentence = page(capsys, command).splitlines()[0]
        assert re.search(rf"^  {command} +{re.escape(sentence)}$", text, flags=re.MULTILINE)
    main([])
    assert capsys.readouterr().out == text


def test_all_options_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    listed = everything(capsys, "fit", "--help=all")
    assert "--trainer.max_epochs" in listed
    assert "--test_after_fit" in listed
    assert "--model.weight_smoothness" in everything(capsys, "fit", "--model.help=GVSL")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fti"], "There is no command fti; did you mean fit?"),
        (["prepar", "--help"], "There is no command prepar; did you mean prepare?"),
        (["--seed_everything=1"], "A command is missing; see python -m gvsl_lightning --help."),
    ],
)
def test_a_wrong_command(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
