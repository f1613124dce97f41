"""Examples of README and docs run as they stand; commands and files exist."""

import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from xml.etree import ElementTree

import pytest
import yaml
from pytorch_lightning.cli import LightningCLI

import gvsl_lightning
from gvsl_lightning import tasks
from gvsl_lightning.cli.main import TOOLS

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if not {"_build", "tutorials"} & set(path.relative_to(ROOT).parts)
}
EXAMPLES = [
    pytest.param(example, id=f"{name} {number}")
    for name, text in PAGES.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
]
COMMANDS = {
    (command, name)
    for name, text in PAGES.items()
    for command in re.findall(r"(?:python -m gvsl_lightning|^gvsl) (\w+)", text, flags=re.MULTILINE)
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {"__name__": "__main__"})


CONFIGURATIONS = {
    (name, page)
    for page, text in PAGES.items()
    for name in re.findall(r"^gvsl .*?--config[ =](\S+)", text, flags=re.MULTILINE)
}


def test_there_are_examples_of_use_and_of_subclassing() -> None:
    assert "```python\n" in PAGES["README.md"]
    for base in ("GVSL", "SimilarityLoss", "Backbone", "PairDataModule", "GlobalTask"):
        assert f"({base}):" in PAGES["docs/extending.md"]


def test_commands_exist() -> None:
    assert {command for command, _ in COMMANDS} >= {"fit", "test", "predict", "benchmark"}
    known = {*TOOLS, *LightningCLI.subcommands()}
    assert [one for one in sorted(COMMANDS) if one[0] not in known] == []


def test_named_configurations_exist() -> None:
    assert len(CONFIGURATIONS) > 20
    files = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")}
    known = files | {name.rpartition("/")[2] for name in files}
    for name, page in CONFIGURATIONS:
        # a plan that another command of the page writes
        own = name in ("PLAN", "plan.yaml")
        assert name in known or (ROOT / name).is_file() or own, (name, page)


def test_files_that_are_named_exist() -> None:
    named = {
        (path, name)
        for name, text in PAGES.items()
        for path in re.findall(r"\b((?:configs|tests|docs)/[\w./-]+\.(?:yaml|sh|py|md|png))", text)
    }
    assert len(named) > 40
    assert [one for one in sorted(named) if not (ROOT / one[0]).is_file()] == []


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", PAGES["README.md"]):
        path, anchor = target
        assert (ROOT / path).exists(), target
        if anchor:
            text = PAGES[path or "README.md"]
            headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
            assert anchor[1:] in slugs, target


def test_each_method_has_a_page() -> None:
    pages = [text for name, text in PAGES.items() if name.startswith("docs/methods/")]
    for name in tasks.__all__:
        task = getattr(tasks, name)
        if issubclass(task, tasks.PretrainTask) and not task.__abstractmethods__:
            role = f"{{class}}`~{task.__module__}.{name}`"
            assert any(role in text and "## Cite" in text for text in pages), name


def test_all_modules_are_in_the_reference() -> None:
    # the page of a package lists what it holds, and the template those of its modules
    assert "   gvsl_lightning\n" in PAGES["docs/api.md"]
    assert ":recursive:" in PAGES["docs/api.md"]
    for module in walk_packages(gvsl_lightning.__path__, "gvsl_lightning."):
        if not module.name.rpartition(".")[2].startswith("_"):
            assert import_module(module.name).__doc__, module.name


def test_citation_and_badges_say_what_the_package_says() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == gvsl_lightning.__version__
    paper = citation["preferred-citation"]
    assert f"title     = {{{paper['title']}}}" in PAGES["README.md"]
    assert f"pages     = {{{paper['start']}--{paper['end']}}}" in PAGES["README.md"]
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    badges = {
        path.stem: ElementTree.parse(path).getroot().get("aria-label")
        for path in (ROOT / "docs" / "badges").glob("*.svg")
    }
    assert f'license = "{citation["license"]}"' in project
    assert badges["licence"] == f"licence: {citation['license']}"
    first, last = re.findall(r"\d\.\d+", badges["python"])
    after = f"3.{int(last.removeprefix('3.')) + 1}"
    assert f'requires-python = ">={first},<{after}"' in project
