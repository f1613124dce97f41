"""Sentences about wrong command lines and files: key, place and nearest spelling."""

from pathlib import Path

import pytest
import torch
import yaml

from gvsl_lightning.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of a command that ends with status 2, all that is printed but for the seed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line != "Seed set to 0"]
    assert printed.out == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def check(found: str, expected: str, place: str) -> None:
    """Compare the key, its place and the nearest spelling; the words between may change."""
    start, _, end = expected.partition(" {} " if " {} " in expected else "; ")
    if " {} " in expected:
        assert found.startswith(f"{start} {place} ")
    else:
        assert found.startswith(start.partition(":")[0])
    if "{near}" in end:
        assert found.endswith(end.rpartition("{near}")[2])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fine.yaml").write_text("trainer:\n  max_steps: 2\n")
    return tmp_path


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("sede_everything: 1", "sede_everything {} is no option of fit; {near} seed_everything?"),
        (
            "trainer: {max_stepz: 5}",
            "trainer.max_stepz {} is no option of trainer; {near} trainer.max_steps?",
        ),
        ("trainer: {max_steps: many}", "trainer.max_steps {} is 'many'; give a whole number."),
        (
            "model: {init_args: {backbone: unett}}",
            "model.init_args.backbone {} is 'unett', which does not exist; {near} unet?",
        ),
        ("trainer: 3", "trainer {} is 3; give options such as trainer.accelerator."),
        ("max_steps: 5", "max_steps {} is no option of fit; {near} trainer.max_steps?"),
        (
            "model: {init_args: {learning_rat: 0.1}}",
            "model.init_args.learning_rat {} is no option of GVSL; "
            "{near} model.init_args.learning_rate?",
        ),
        (
            "model: {backbon: unet}",
            "model.backbon {} is no option of GVSL; {near} model.backbone?",
        ),
        (
            "model: {init_args: {zzz: 1}}",
            "model.init_args.zzz {} is no option of GVSL; "
            "python -m gvsl_lightning fit --model.help=GVSL lists all.",
        ),
        (
            "model: {init_args: {learning_rate: fast}}",
            "model.init_args.learning_rate {} is 'fast'; give a number.",
        ),
        (
            "trainer: {precision: bf16-mixd}",
            "trainer.precision {} is 'bf16-mixd'; {near} bf16-mixed?",
        ),
        (
            "model: {init_args: {backbone_options: 8}}",
            "model.init_args.backbone_options {} is 8; give options, key: value or null.",
        ),
        (
            "data: {init_args: {size: [16, 16, sixteen]}}",
            "data.init_args.size[2] {} is 'sixteen'; give a whole number.",
        ),
        (
            "model: {init_args: 3}",
            "model.init_args {} is 3; give options.",
        ),
        (
            "model: {class_path: GVLS}",
            "model.class_path {} is GVLS, which is no LightningModule; {near} GVSL?",
        ),
        (
            "model: {class_path: gvsl_lightning.tasks.Segmentaton}",
            "model.class_path {} is gvsl_lightning.tasks.Segmentaton, which is no "
            "LightningModule; {near} Segmentation?",
        ),
        (
            "model: {class_pth: GVSL}",
            "model.class_pth {} is no option of model; {near} model.class_path?",
        ),
        (
            "trainer: {callbacks: [RunSummary, {class_path: MatchingFigur}]}",
            "trainer.callbacks[1].class_path {} is MatchingFigur, which is no Callback; "
            "{near} MatchingFigure?",
        ),
        (
            "trainer: {callbacks: [{class_path: MatchingFigure, init_args: {every_n: 3}}]}",
            "trainer.callbacks[0].init_args.every_n {} is no option of MatchingFigure; "
            "{near} trainer.callbacks[0].init_args.every_n_epochs?",
        ),
        (
            "data: {init_args: {seed: '${seed_everythin}'}}",
            "data.init_args.seed {} is ${seed_everythin}, but there is no seed_everythin; "
            "{near} seed_everything?",
        ),
        (
            "data: {init_args: {scene: '${oc.env:NOT_SET}'}}",
            "data.init_args.scene {} is ${oc.env:NOT_SET}: Environment variable 'NOT_SET' not "
            "found.",
        ),
        (
            "model: {init_args: {corruption: {shufling_rate: 1}}}",
            "model.init_args.corruption.shufling_rate {} is no option of Corruption; "
            "{near} model.init_args.corruption.shuffling_rate?",
        ),
        (
            "model: {init_args: {backbone_options: {chanels: [8, 16]}}}",
            "model.init_args.backbone_options.chanels {} is no option of unet; "
            "{near} model.init_args.backbone_options.channels?",
        ),
        ("- 1\n- 2", "wrong.yaml holds [1, 2]; give it lines of the form key: value."),
        (
            "trainer:\n  max_steps: [1\nmodel: 3",
            "wrong.yaml, line 3, column 6, is no valid YAML: did not find expected ',' or ']'; "
            "correct it.",
        ),
    ],
)
def test_a_wrong_file_among_several(
    content: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "wrong.yaml").write_text(content)
    words = [f"--config={QUICKSTART}", "-c", "fine.yaml", "--config", "wrong.yaml"]
    check(complaint(["fit", *words], capsys), sentence, "in wrong.yaml")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--trainer.max_stepz=3"],
            "--trainer.max_stepz {} is no option of trainer; {near} --trainer.max_steps?",
        ),
        (["--trainer.max_steps", "x"], "--trainer.max_steps {} is 'x'; give a whole number."),
        (["--model=GVLS"], "--model {} is GVLS, which is no LightningModule; {near} GVSL?"),
        (
            ["--learning_rate=1"],
            "--learning_rate {} is no option of fit; {near} --model.init_args.learning_rate?",
        ),
        (
            ["--model.learning_rat=1"],
            "--model.learning_rat {} is no option of GVSL; {near} --model.learning_rate?",
        ),
        (
            ["--trainer.callbacks+=MatchingFigur"],
            "--trainer.callbacks {} is MatchingFigur, which is no Callback; {near} MatchingFigure?",
        ),
        (
            ["--trainer.callbacks+=MatchingFigure", "--trainer.callbacks.num_pair=3"],
            "--trainer.callbacks.num_pair {} is no option of MatchingFigure; "
            "{near} --trainer.callbacks.num_pairs?",
        ),
        (
            ["--model.init_args.spatial={rotaton: 1}"],
            "--model.init_args.spatial.rotaton {} is no option of RandomSpatialTransform; "
            "{near} --model.init_args.spatial.rotation?",
        ),
        (
            ["--config={trainer: {max_stepz: 3}}"],
            "--trainer.max_stepz {} is no option of trainer; {near} --trainer.max_steps?",
        ),
        (["word"], "unrecognized arguments: word; see python -m gvsl_lightning fit --help."),
        (["--config=no.yaml"], "no.yaml cannot be read, as it does not exist; correct its path."),
        (
            ["--trainer.devices=[a]"],
            "The trainer refuses its options: `devices` selected with `CPUAccelerator` should be "
            "an int > 0.",
        ),
    ],
)
def test_wrong_words(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = complaint(["fit", f"--config={QUICKSTART}", *words], capsys)
    check(found, sentence, "on the command line")


@pytest.mark.parametrize(
    "word", ["--model.class_names=[a,b]", "--data.class_names=[a,b]", "--trainer.logger.tags=[a]"]
)
def test_options_that_are_spelled_like_keys_of_a_class_are_none(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS / "finetune" / "segmentation.yaml"
    found = complaint(["fit", f"--config={config}", word, "--trainer.max_stepz=3"], capsys)
    assert found.startswith("--trainer.max_stepz on the command line is no option of trainer;")


@pytest.mark.parametrize(
    ("content", "end"),
    [(b"# caf\xe9\nseed_everything: 1", "give a YAML file."), (b"# none", "key: value.")],
)
def test_file_that_is_no_text_or_empty(
    content: bytes, end: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "wrong.yaml").write_bytes(content)
    found = complaint(["fit", f"--config={QUICKSTART}", "--config=wrong.yaml"], capsys)
    assert found.startswith("wrong.yaml ")
    assert found.endswith(end)


@pytest.mark.parametrize("config", ["quickstart", "stoic"])
def test_nothing_else_is_wrong(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = complaint(["fit", f"--config={config}", "--wrong=1"], capsys)
    assert found.startswith("--wrong on the command line is no option of fit;")


def test_a_file_of_a_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.yaml").write_text("class_path: GVSL\ninit_args: {learning_rat: 1}")
    found = complaint(["fit", f"--config={QUICKSTART}", "--model=model.yaml"], capsys)
    assert found.startswith("model.init_args.learning_rat in model.yaml is no option of GVSL;")


def test_missing_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = complaint(["fit", "--model=GVSL"], capsys)
    assert found.startswith("--data must be given, here or in a --config file;")
    (folder / "bare.yaml").write_text("model: {init_args: {learning_rate: 1}}")
    found = complaint(["fit", "--config=bare.yaml", "--data=Phantom"], capsys)
    assert found == "model in bare.yaml has no class_path; add it."


def test_a_file_given_before_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "all.yaml").write_text("fit: {trainer: {max_stepz: 1}}")
    found = complaint(["--config=all.yaml", "fit", f"--config={QUICKSTART}"], capsys)
    assert found.startswith("trainer.max_stepz in all.yaml is no option of trainer;")


def test_a_checkpoint_of_something_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"state_dict": {}, "hyper_parameters": {"class_names": ["a", "b"]}}
    content |= {"optimizer_states": {}, "loops": {}}
    torch.save(content, folder / "other.ckpt")
    found = complaint(["fit", f"--config={QUICKSTART}", "--ckpt_path=other.ckpt"], capsys)
    assert found.startswith("other.ckpt")
    assert "backbone" in found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["prepare"],
            "--out must be given; see python -m gvsl_lightning prepare --help.",
        ),
        (["prepare", "--ouz=3"], "--ouz {} is no option of prepare; {near} --out?"),
        (
            ["prepare", "--data.modalit=ct", "--out=o"],
            "--data.modalit {} is no option of PretrainDataModule; {near} --data.modality?",
        ),
        (
            ["prepare", "--out=o", "--workers=0"],
            "--workers {} is 0; give a whole number above 0 or null.",
        ),
        (
            ["prepare", "--config=wrong.yaml", "--out=o"],
            "data.init_args.num_worker in wrong.yaml is no option of PretrainDataModule; "
            "{near} data.init_args.num_workers?",
        ),
        (
            ["features", "--root=x", "--weights=none", "--cases", "abc"],
            "--cases {} is 'abc'; give a whole number above 0.",
        ),
        (
            ["profile", f"--config={QUICKSTART}", "--repeat", "3"],
            "--repeat {} is no option of profile; {near} --repeats?",
        ),
        (
            ["benchmark", "--out=o"],
            "the following arguments are required: --config; "
            "see python -m gvsl_lightning benchmark --help.",
        ),
        (
            ["benchmark", "--config=plan.yaml", "--out=o"],
            "methods.GVSL.confg in plan.yaml is no option of a method; {near} methods.GVSL.config?",
        ),
    ],
)
def test_tools(
    words: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"trainer": {"max_steps": 1}, "data": {"init_args": {"num_worker": 3}}}
    (folder / "wrong.yaml").write_text(yaml.safe_dump(content))
    (folder / "plan.yaml").write_text(
        "{methods: {GVSL: {confg: a.yaml}}, tasks: {}, modes: {}, seeds: [0], baseline: GVSL}"
    )
    check(complaint(words, capsys), sentence, "on the command line")


@pytest.mark.parametrize("word", ["ON", "no", "001"])
def test_texts_that_yaml_takes_for_other_values_need_quotes(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--model=Segmentation", f"--model.class_names=[background, {word}]"])
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert "class_names[1]" in sentence
    assert "quotes" in sentence
