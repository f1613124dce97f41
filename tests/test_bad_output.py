"""Wrong files of options and weights, full disks and wrong places for results, at every command.

Whatever is wrong: exit status 2, one sentence on stderr that names the file or option and what to
do, no file written, changed or removed, and not much time lost.
"""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.cli.main import main
from gvsl_lightning.export.exporter import FORMATS
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.phantom import generate_phantom
from gvsl_lightning.weights import save_backbone

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE = (16, 16, 16)

Capture = pytest.CaptureFixture[str]

TRAINER = [
    *("--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu"),
    *("--trainer.devices=1", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"),
    *("--trainer.logger.name=x", "--model.backbone_options={channels: [8, 16]}"),
]
DATA = [
    *("--data.root=images", "--data.modality=none"),
    *("--data.spacing=null", "--data.patch_size=[16,16,16]"),
    "--data.num_workers=0",
]
PRETRAIN = [
    *(f"--config={CONFIGS / 'pretrain' / 'gvsl.yaml'}", *TRAINER, *DATA),
    "--model.affine_channels=8",
]
TRANSFER = [
    *(f"--config={CONFIGS / 'finetune' / 'segmentation.yaml'}", *TRAINER, *DATA),
    *("--data.label_root=labels", "--data.val=1", "--data.test=1"),
]
SCRATCH = "--model.mode=scratch"
FEATURES = ["features", "--root=images", "--label_root=labels", "--samples=20"]
PREPARE = [
    *("prepare", "--data.root=images", "--data.label_root=labels", "--data.modality=none"),
    "--workers=1",
]
PREDICT = ["predict", *TRANSFER, SCRATCH, "--ckpt_path=segmentation.ckpt"]
OUTPUTS = {"safetensors": ".safetensors", "torchscript": ".ts", "pt2": ".pt2", "nnunet": ".pth"}


def slow(*values: Any) -> Any:
    """A case that takes the same way as a quick one."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four volumes with labels, a checkpoint of each kind, backbones and prepared volumes."""
    root = tmp_path_factory.mktemp("made")
    for number in range(4):
        phantom = generate_phantom("cardiac_ct", number, SIZE)
        image = np.asarray(phantom["image"], np.float32).reshape(SIZE)
        label = np.asarray(phantom["label"]).reshape(SIZE).clip(max=1).astype(np.uint8)
        for folder, array in (("images", image), ("labels", label)):
            (root / folder).mkdir(exist_ok=True)
            volume = nibabel.Nifti1Image(array, np.eye(4))
            nibabel.save(volume, root / folder / f"case{number}.nii.gz")
    plain = ["--trainer.logger=false", "--trainer.callbacks=null"]
    plain += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    simclr = [word.replace("gvsl.yaml", "simclr.yaml") for word in PRETRAIN[:-1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        runs = {"gvsl": PRETRAIN, "simclr": simclr, "segmentation": [*TRANSFER, SCRATCH]}
        for name, words in runs.items():
            main(["fit", *words, *plain, f"--trainer.default_root_dir={name}"])
            next((root / name).rglob("*.ckpt")).rename(root / f"{name}.ckpt")
            shutil.rmtree(root / name)
        main([*PREPARE, "--out=prepared"])
    card = {"data": {"modality": "none"}}
    save_backbone(build_backbone("unet", channels=[8, 16]), root / "net/backbone.safetensors", card)
    norm: list[Any] = ["instance", {"affine": True}]
    dynunet = build_backbone("dynunet", filters=[8, 16, 16], norm_name=norm)
    save_backbone(dynunet, root / "dynunet/backbone.safetensors", card)
    (root / "file").write_text("mine")
    return root


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of what was made."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder by its path; files with their bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refusal(words: list[str], capsys: Capture, left: tuple[str, ...] = ()) -> str:
    """The one sentence of a command that ends with status 2 and leaves what there was.

    Args:
        words: of the command line.
        capsys: the fixture.
        left: beginnings of the paths that may be new.
    """
    before = contents(Path.cwd())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert "Traceback" not in printed.err + printed.out
    sentences = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(sentences) == 1
    assert printed.err.splitlines()[-1] == sentences[0]
    after = contents(Path.cwd())
    assert {path: after.get(path) for path in before} == before
    assert [path for path in after if path not in before and not path.startswith(left)] == []
    return sentences[0].removeprefix("error: ")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond a size in bytes: a real write fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


FULL = "cannot be written (File too large); make room there and give the same command again."
NO_SPACE = FULL.replace("File too large", "No space left on device")
"""Where NumPy and PyTorch give no reason."""


# Files of options ---------------------------------------------------------------------------------


OPTION_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot be read, as it does not exist; correct its path."),
    "empty": (b"", "is empty; give it lines of the form key: value."),
    "comment": (b"# nothing\n", "is empty; give it lines of the form key: value."),
    "list": (b"- 1\n- 2\n", "holds [1, 2]; give it lines of the form key: value."),
    "number": (b"3\n", "give a YAML file."),
    "tab": (b"data:\n\troot: x\n", ", line 2, column 1, is no valid YAML: found character"),
    "bracket": (b"data: [1\nmodel: 3", ", line 2, column 6, is no valid YAML: did not find"),
    "twice": (b"data: {}\ndata: {}\n", ", line 2, column 1, is no valid YAML: found duplicate key"),
    "alias": (b"data: *other\n", ", line 1, column 7, is no valid YAML: found undefined alias"),
    "tag": (b"data: !!python/object/apply:os.getcwd []\n", "is no valid YAML: could not determine"),
    "documents": (b"data: {}\n---\ndata: {}\n", "is no valid YAML: but found another document"),
    "deep": (b"[" * 3000, "is no valid YAML: exceeded maximum nesting depth"),
    "latin": (b"# caf\xe9\ndata: {}\n", "cannot be read ('utf-8' codec can't decode byte 0xe9"),
    "utf16": ("data: {}\n".encode("utf-16"), "cannot be read ('utf-8' codec can't decode"),
    "binary": (bytes(range(256)), "cannot be read ('utf-8' codec can't decode"),
    "nul": (b"data: a\x00b\n", "is no valid YAML: unacceptable character #x0000"),
}


OPTIONS_OF = {
    "benchmark": ["benchmark", "--out=out"],
    "export": ["export"],
    "features": ["features"],
    "fit": ["fit", f"--config={CONFIGS / 'quickstart.yaml'}"],
    "prepare": ["prepare", "--data.root=images", "--out=out"],
    "profile": ["profile", f"--config={CONFIGS / 'quickstart.yaml'}"],
}
# these read like each other, and tests/cli/test_diagnosis.py has more of them
BUILDS_PARSERS = {"fit": ("folder", "twice", "documents", "tag", "nul"), "profile": ("twice",)}


@pytest.mark.parametrize(
    ("command", "case"),
    [
        (command, case)
        for command in OPTIONS_OF
        for case in BUILDS_PARSERS.get(command, (*OPTION_FILES, "folder"))
    ],
)
def test_file_of_options(
    command: str,
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    content, expected = OPTION_FILES.get(case, (None, "Is a directory"))
    if case == "folder":
        Path("wrong.yaml").mkdir()
    elif content is not None:
        Path("wrong.yaml").write_bytes(content)
    sentence = refusal([*OPTIONS_OF[command], "--config=wrong.yaml"], capsys)
    assert sentence.startswith("wrong.yaml")
    assert expected in sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("dta: {class_path: PretrainDataModule}", "has no data with class_path and init_args"),
        ("just words", "has no data with class_path and init_args"),
        ("data:", "has no data with class_path and init_args"),
        ("data: [1, 2]", "has no data with class_path and init_args"),
        (
            "data: {init_args: {modality: '${nothing}'}}",
            "cannot be read (Interpolation key 'nothing'",
        ),
        ("data: PretrainDataModul", "did you mean PretrainDataModule?"),
        ("data: {init_args: {modality: xray}}", "data.init_args.modality in wrong.yaml is 'xray'"),
    ],
)
def test_configuration_of_prepare(content: str, sentence: str, work: Path, capsys: Capture) -> None:
    Path("wrong.yaml").write_text(content)
    words = ["prepare", "--config=wrong.yaml", "--data.root=images", "--out=out"]
    found = refusal(words, capsys)
    assert "wrong.yaml" in found
    assert sentence in found


def test_data_may_be_the_name_of_a_class_in_a_configuration(work: Path) -> None:
    Path("data.yaml").write_text("data: PretrainDataModule")
    main(["prepare", "--config=data.yaml", "--data.root=images", "--out=out", "--workers=1"])
    assert len(json.loads(Path("out/index.json").read_text())["names"]) == 4


TASK = {"config": "task.yaml", "metric": "test/dice", "monitor": "val/dice"}
PLAN: dict[str, Any] = {
    "methods": {"Scratch": {}},
    "tasks": {"hearts": TASK},
    "modes": {"all": {"model.init_args.mode": "finetune"}},
    "seeds": [0],
    "baseline": "Scratch",
}


LINES = "give lines of the form NAME: VALUE."
PLANS: list[tuple[dict[str, Any], str]] = [
    ({"methods": ["a"]}, f"methods in plan.yaml is ['a']; {LINES}"),
    ({"methods": None}, "plan.yaml lacks methods; see configs/benchmark"),
    ({"methods": {"Scratch": "x"}}, f"methods.Scratch in plan.yaml is 'x'; {LINES}"),
    ({"methods": {"G": {"config": "no.yaml"}}}, "/no.yaml, which does not exist; correct the path"),
    (
        {"methods": {"G": {"weights": "no.ckpt"}}},
        "methods.G.weights in plan.yaml is no.ckpt, which",
    ),
    ({"tasks": {}}, "tasks in plan.yaml is empty; give one or more."),
    ({"tasks": [1]}, f"tasks in plan.yaml is [1]; {LINES}"),
    ({"tasks": {"h": {"metric": "test/dice"}}}, "plan.yaml lacks tasks.h.config;"),
    ({"tasks": {"h": {**TASK, "config": 3}}}, "tasks.h.config in plan.yaml is 3; give a text."),
    ({"tasks": {"h": {**TASK, "metric": "dice"}}}, "give one that begins with test/"),
    ({"modes": "linear"}, f"modes in plan.yaml is 'linear'; {LINES}"),
    ({"modes": {"all": [1]}}, f"modes.all in plan.yaml is [1]; {LINES}"),
    ({"seeds": 3}, "seeds in plan.yaml is 3; give a list."),
    ({"seeds": ["a"]}, "seeds.0 in plan.yaml is 'a'; give a whole number."),
    ({"seeds": []}, "seeds in plan.yaml is empty; give one or more."),
    ({"baseline": None}, "plan.yaml lacks baseline; see configs/benchmark"),
    ({"baseline": "Skratch"}, "baseline in plan.yaml is 'Skratch'; did you mean Scratch?"),
    ({"pretrain": ["a"]}, f"pretrain in plan.yaml is ['a']; {LINES}"),
    ({"figures": ["ncc"]}, f"figures in plan.yaml is ['ncc']; {LINES}"),
    ({"sedes": [1]}, "sedes in plan.yaml is no option of a plan; did you mean seeds?"),
]


@pytest.mark.parametrize(("changes", "words"), PLANS)
def test_plan(
    changes: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text("trainer: null\n")
    methods = {"Scratch": {}, **m} if isinstance(m := changes.get("methods"), dict) else m
    given = {**changes, "methods": methods} if "methods" in changes else changes
    Path("plan.yaml").write_text(yaml.safe_dump({**PLAN, **given}))
    assert words in refusal(["benchmark", "--config=plan.yaml", "--out=out"], capsys)


# Checkpoints and weights --------------------------------------------------------------------------


def _truncated(path: Path, source: str) -> None:
    content = Path(source).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _pickled(path: Path, source: str) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {}, "path": Path("a")}))


def _objects(path: Path, source: str) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {}, "path": Path("a")}, path)


def _archive(path: Path, source: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


BROKEN: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    "truncated": (_truncated, "may be corrupted or incomplete"),
    "empty": (lambda path, _: path.touch(), "may be corrupted or incomplete"),
    "text": (lambda path, _: path.write_text("a text, not weights\n"), "may be corrupted"),
    "zip": (_archive, "may be corrupted or incomplete"),
    "pickle": (_pickled, "holds pickled Python objects, which could run code"),
    "objects": (_objects, "holds pickled Python objects, which could run code"),
    "volume": (lambda path, _: shutil.copy("images/case0.nii.gz", path), "is corrupted, or holds"),
    "folder": (lambda path, _: path.mkdir(), "does not exist"),
    "missing": (lambda path, _: None, "does not exist"),
}
RESUMED = {
    "fit, pre-training": ["fit", *PRETRAIN],
    "fit, transfer": ["fit", *TRANSFER, SCRATCH],
    "test": ["test", *TRANSFER, SCRATCH],
    "predict": ["predict", *TRANSFER, SCRATCH],
}
SOME = ("truncated", "missing")


@pytest.mark.parametrize(
    ("case", "command"),
    [
        *((case, "fit, transfer") for case in SOME),
        ("missing", "predict"),
        *(slow(case, "fit, transfer") for case in BROKEN if case not in SOME),
        *(slow(case, command) for case in SOME for command in ("fit, pre-training", "test")),
        slow("truncated", "predict"),
    ],
)
def test_broken_checkpoint_to_go_on_from(
    case: str, command: str, work: Path, capsys: Capture
) -> None:
    make, words = BROKEN[case]
    make(Path("wrong.ckpt"), "segmentation.ckpt")
    sentence = refusal([*RESUMED[command], "--ckpt_path=wrong.ckpt"], capsys)
    assert sentence.startswith("wrong.ckpt")
    assert ("is damaged" if case in ("truncated", "empty") else words) in sentence


NO_RUN = "is no checkpoint of a run"


@pytest.mark.parametrize(
    ("command", "checkpoint", "words"),
    [
        ("fit, pre-training", "simclr.ckpt", "of SimCLR and the model is GVSL; give one of GVSL."),
        ("fit, transfer", "gvsl.ckpt", "or --model.weights=gvsl.ckpt to start from"),
        ("predict", "net/backbone.safetensors", NO_RUN),
        slow("fit, pre-training", "segmentation.ckpt", "of Segmentation and the model is GVSL;"),
        slow("test", "gvsl.ckpt", "of GVSL and the model is Segmentation; give one of"),
        slow("predict", "simclr.ckpt", "of SimCLR and the model is Segmentation;"),
        slow("fit, transfer", "net/backbone.safetensors", NO_RUN),
    ],
)
def test_checkpoint_of_another_method(
    command: str, checkpoint: str, words: str, work: Path, capsys: Capture
) -> None:
    sentence = refusal([*RESUMED[command], f"--ckpt_path={checkpoint}"], capsys)
    assert sentence.startswith(f"{checkpoint} is ")
    assert words in sentence


def _change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.__setitem__(key, value)


def _not_finite(content: dict[str, Any]) -> None:
    content["state_dict"]["head.bias"][0] = torch.inf


def _entry_of_another_version(content: dict[str, Any]) -> None:
    content["state_dict"]["head.scale"] = content["state_dict"].pop("head.bias")


def _option_of_another_version(content: dict[str, Any]) -> None:
    content["hyper_parameters"]["unheard_of"] = 3


MODEL = "--model.init_args"
CHANGED: list[Any] = [
    ("test", _entry_of_another_version, (), "1 missing (head.bias); 1 unexpected (head.scale)"),
    ("fit, transfer", lambda content: content.pop("optimizer_states"), (), "state of the training"),
    ("predict", None, (f"{MODEL}.in_channels=2",), "model.in_channels is 2"),
    slow("predict", _not_finite, (), "holds NaN or infinite values in head.bias"),
    slow("fit, transfer", _not_finite, (), "holds NaN or infinite values in head.bias"),
    slow("predict", _change("state_dict", [1]), (), NO_RUN),
    slow("predict", _change("hyper_parameters", None), (), NO_RUN),
    slow("test", _option_of_another_version, (), "whose unheard_of this one does"),
    slow(
        "predict",
        None,
        tuple(f"--{part}.init_args.class_names=[background,a,b]" for part in ("model", "data")),
        "class_names is",
    ),
    slow(
        "predict",
        None,
        (f"{MODEL}.backbone_options={{channels: [16, 32]}}",),
        "model.backbone_options is",
    ),
    slow(
        "predict",
        None,
        (f"{MODEL}.backbone=basic_unet", f"{MODEL}.backbone_options=null"),
        "model.backbone",
    ),
]


@pytest.mark.parametrize(("command", "change", "options", "words"), CHANGED)
def test_checkpoint_that_does_not_fit(
    command: str,
    change: Callable[[dict[str, Any]], Any] | None,
    options: tuple[str, ...],
    words: str,
    work: Path,
    capsys: Capture,
) -> None:
    content = torch.load("segmentation.ckpt", weights_only=True)
    if change is not None:
        change(content)
    torch.save(content, "wrong.ckpt")
    sentence = refusal([*RESUMED[command], *options, "--ckpt_path=wrong.ckpt"], capsys)
    assert "wrong.ckpt" in sentence
    assert words in sentence


@pytest.mark.parametrize("path", ["", "best"])
def test_no_path_of_a_checkpoint(path: str, work: Path, capsys: Capture) -> None:
    sentence = refusal(["test", *TRANSFER, SCRATCH, f"--ckpt_path={path}"], capsys)
    assert sentence == f"--ckpt_path is {path!r}; give the path of a checkpoint."


def test_url_that_cannot_be_reached(work: Path, capsys: Capture) -> None:
    words = ["test", *TRANSFER, SCRATCH, "--ckpt_path=memory://nothing/here.ckpt"]
    sentence = refusal(words, capsys)
    assert sentence.startswith("memory://nothing/here.ckpt cannot be read")
    assert sentence.endswith("check the address, your credentials and the network.")


def _edited(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], str]:
    def make() -> str:
        tensors = load_file("net/backbone.safetensors")
        edit(tensors)
        save_file(tensors, "net/backbone.safetensors")
        return "net/backbone.safetensors"

    return make


def _few(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors)[5:]:
        del tensors[name]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = torch.nan


def _of(name: str, **options: Any) -> Callable[[], str]:
    def make() -> str:
        backbone = build_backbone(name, **options)
        return str(save_backbone(backbone, "other/backbone.safetensors", {}))

    return make


def _broken(case: str, suffix: str = ".ckpt") -> Callable[[], str]:
    def make() -> str:
        path = Path(f"wrong{suffix}")
        source = "segmentation.ckpt" if suffix == ".ckpt" else "net/backbone.safetensors"
        BROKEN[case][0](path, source)
        if path.is_file():
            shutil.copy("net/backbone.json", "wrong.json")
        return str(path)

    return make


WEIGHTS: dict[str, tuple[Callable[[], str], str]] = {
    **{case: (_broken(case), expected) for case, (_, expected) in BROKEN.items()},
    **{
        f"{case} safetensors": (_broken(case, ".safetensors"), "may be corrupted or incomplete")
        for case in ("truncated", "empty", "text")
    },
    "few": (_edited(_few), "5 of 24 backbone entries loaded; 19 missing"),
    "nan": (_edited(_nan), "holds NaN or infinite values in decoder.0.0.conv.bias"),
}
OTHER_ARCHITECTURES: dict[str, tuple[Callable[[], str], str]] = {
    "wide": (_of("unet", channels=[16, 32]), "24 of another shape"),
    "deep": (_of("unet", channels=[8, 16, 32]), "too little for the unet backbone"),
    "basic_unet": (_of("basic_unet", features=[8, 8, 8, 16, 16, 8]), "0 of 24 backbone entries"),
}
READERS = {
    "fit": ["fit", *TRANSFER, "--model.weights="],
    "features": [*FEATURES, "--backbone_options={channels: [8, 16]}", "--out=out", "--weights="],
    "export": ["export", "--format=safetensors", "--out=out/net.safetensors", "--weights="],
}


@pytest.mark.parametrize(
    ("case", "command"),
    [
        *((case, command) for command in ("features", "export") for case in WEIGHTS),
        # these two take the architecture of the file
        *((case, "fit") for case in ("missing", "wide")),
        *(slow(case, "fit") for case in ("truncated", "nan", "few", "deep", "basic_unet")),
    ],
)
def test_wrong_weights(case: str, command: str, work: Path, capsys: Capture) -> None:
    make, expected = {**WEIGHTS, **OTHER_ARCHITECTURES}[case]
    path = make()
    *words, last = READERS[command]
    sentence = refusal([*words, f"{last}{path}"], capsys)
    assert sentence.startswith(path)
    assert expected in sentence


def test_head_of_another_number_of_classes(work: Path, capsys: Capture) -> None:
    names = [f"--{part}.init_args.class_names=[background,a,b]" for part in ("model", "data")]
    words = [
        "--model.weights=segmentation.ckpt",
        "--model.head_from_weights=true",
    ]
    sentence = refusal(["predict", *TRANSFER, *names, *words], capsys)
    assert sentence.startswith("segmentation.ckpt has no head of this task's shape")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, "does not say which network it holds: give a .ckpt of this package, or a .safetens"),
        ('{"backbone": {"na', "does not say which network it holds"),
        ("[1, 2]", "does not say which network it holds"),
        (
            '{"backbone": {"name": "segresnet", "in_channels": 1, "options": {"channels": [8]}}}',
            "backbone_options.channels is no option of segresnet",
        ),
        (
            '{"backbone": {"name": "unett", "in_channels": 1, "options": {}}}',
            "is 'unett'; did you mean unet?",
        ),
    ],
    ids=["missing", "broken", "list", "other", "unknown"],
)
def test_card_of_weights(card: str | None, expected: str, work: Path, capsys: Capture) -> None:
    Path("net/backbone.json").unlink()
    if card is not None:
        Path("net/backbone.json").write_text(card)
    *words, last = READERS["export"]
    assert expected in refusal([*words, f"{last}net/backbone.safetensors"], capsys)
    if card is not None and "name" in card:  # without one, the options of the command are taken
        *words, last = READERS["features"]
        sentence = refusal([*words, f"{last}net/backbone.safetensors"], capsys)
        assert "net/backbone.safetensors" in sentence
        assert expected in sentence


def test_adapted_weights_still_load(work: Path, capsys: Capture) -> None:
    path = _of("unet", in_channels=2, channels=[8, 16])()
    plain = ["--trainer.logger=false", "--trainer.callbacks=null"]
    main(["fit", *TRANSFER, f"--model.weights={path}", *plain])
    printed = capsys.readouterr().out
    assert printed.count("adapted to the number of input channels") == 1


# Nothing is left of a run that did not begin ------------------------------------------------------


WANDB = [
    *("--trainer.logger=VersionedWandbLogger", "--trainer.logger.save_dir=runs"),
    "--trainer.logger.offline=true",
]


ROOT = "--data.root"
NO_ROOT = "nowhere does not exist"
FIT = ["fit", *TRANSFER]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", *PRETRAIN, f"{ROOT}=nowhere"], NO_ROOT),
        ([*FIT, SCRATCH, f"{ROOT}=nowhere"], NO_ROOT),
        ([*FIT, f"{MODEL}.weights=nowhere.ckpt"], "nowhere.ckpt does not"),
        slow(["fit", *PRETRAIN, f"{ROOT}=net"], "net holds no volume"),
        slow(["fit", *PRETRAIN, "--data.val_root=nowhere"], NO_ROOT),
        slow(["fit", *PRETRAIN, f"{ROOT}=images/case0.nii.gz"], "holds one volume"),
        slow([*FIT, SCRATCH, "--data.label_root=nowhere"], "nowhere"),
        slow([*FIT, SCRATCH, "--data.class_names=[a,b]"], "same class_names"),
        slow([*FIT, SCRATCH, f"{MODEL}.in_channels=2"], "make them equal"),
        slow([*FIT, f"{MODEL}.weights=images"], "images does not exist or is no"),
        slow(["validate", *TRANSFER, SCRATCH, f"{ROOT}=nowhere"], NO_ROOT),
        slow(["test", *TRANSFER, SCRATCH, f"{ROOT}=nowhere"], NO_ROOT),
    ],
)
def test_nothing_is_left_of_a_run_that_did_not_begin(
    words: list[str], expected: str, work: Path, capsys: Capture
) -> None:
    assert expected in refusal([*words, *WANDB], capsys)


# Places for results -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below", ""])
@pytest.mark.parametrize(
    "command",
    [
        [*FEATURES, "--weights=net/backbone.safetensors"],
        PREPARE,
        ["benchmark", f"--config={CONFIGS / 'benchmark' / 'phantom_smoke.yaml'}"],
    ],
    ids=lambda command: command[0],
)
def test_place_that_is_no_folder(
    command: list[str], place: str, work: Path, capsys: Capture
) -> None:
    sentence = refusal([*command, f"--out={place}"], capsys)
    expected = {
        "file": "file is no folder; give another path.",
        "file/below": "file is no folder; give another path.",
        "": "--out is empty; give a path.",
    }
    assert sentence.endswith(expected[place])
    assert place in sentence


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["fit", *PRETRAIN], "--trainer.logger.save_dir"),
        ([*PREDICT, "--trainer.callbacks=PredictionWriter"], "--trainer.callbacks.folder"),
        slow(["fit", *TRANSFER, SCRATCH], "--trainer.logger.save_dir"),
        slow(["test", *PREDICT[1:]], "--trainer.logger.save_dir"),
    ],
    ids=["fit, pre-training", "predict", "fit, transfer", "test"],
)
def test_folder_of_a_run_that_is_no_folder(
    command: list[str], option: str, work: Path, capsys: Capture
) -> None:
    sentence = refusal([*command, f"{option}=file/below"], capsys)
    assert "file/below" in sentence
    assert sentence.endswith("is no folder; give another path.")


@pytest.mark.parametrize("format", FORMATS)
def test_place_of_an_export(format: Any, work: Path, capsys: Capture) -> None:
    words = ["export", f"--format={format}", "--weights=net/backbone.safetensors"]
    suffix = FORMATS[format].suffix
    sentence = refusal([*words, f"--out=file/net{suffix}"], capsys)
    assert f"file/net{suffix} cannot be made, as {work / 'file'} is no folder;" in sentence
    if suffix:
        assert f"--out is images; a file of {format} ends in {suffix}" in refusal(
            [*words, "--out=images"], capsys
        )
        Path(f"mine{suffix}").mkdir()
        assert "nothing that such an export" in refusal([*words, f"--out=mine{suffix}"], capsys)
        Path(f"mine{suffix}").rmdir()
        Path(f"mine{suffix}").write_text("mine")
        sentence = refusal([*words, f"--out=mine{suffix}"], capsys)
        assert f"mine{suffix} exists: give another --out, or --overwrite true." in sentence
    else:
        words += ["--overwrite=true", "--out=images"]
        assert "images is nothing that such an export wrote" in refusal(words, capsys)


@pytest.mark.parametrize("place", ["", "images", "file/below.json"])
def test_place_of_a_profile(place: str, work: Path, capsys: Capture) -> None:
    words = ["profile", *PRETRAIN, "--data.patch_size=[16, 16, 16]", f"--json={place}"]
    sentence = refusal(words, capsys)
    assert sentence.endswith(("give the name of a file.", "file is no folder; give another path."))


def test_results_do_not_mix_with_the_volumes(work: Path, capsys: Capture) -> None:
    writer = [*PREDICT, "--trainer.callbacks=PredictionWriter"]
    for place, root in (("images", "images"), ("images/below", "images"), ("labels/a", "labels")):
        sentence = refusal([*writer, f"--trainer.callbacks.folder={place}"], capsys)
        assert sentence.startswith(f"{place} lies in {root}, the ")
        assert sentence.endswith("give another folder for them.")
    for place, kind in (("images", "volumes"), ("./labels", "label maps")):
        sentence = refusal([*PREPARE, f"--out={place}"], capsys)
        assert sentence == f"{place} holds the {kind} themselves; give another folder as --out."


def test_prepared_volumes_among_volumes_and_labels_are_no_volumes(work: Path) -> None:
    before = contents(work / "images") | contents(work / "labels")
    nested = ["--data.root=images", "--data.label_root=labels"]
    for place in ("images/below", "labels/below", "again"):
        main(["prepare", *nested, "--data.modality=none", "--workers=1", f"--out={place}"])
        index = json.loads(Path(place, "index.json").read_text())
        assert index["names"] == [f"case{number}" for number in range(4)]
        assert index["origins"] == [f"{work}/images/case{number}.nii.gz" for number in range(4)]
        assert all(index["labelled"])
    sidecar = json.loads(Path("again/volumes/case0.json").read_text())
    assert sidecar["label"]["path"] == f"{work}/labels/case0.nii.gz"
    after = contents(work / "images") | contents(work / "labels")
    assert {name: after[name] for name in before} == before


def test_folder_prepared_in_another_way(work: Path, capsys: Capture) -> None:
    main([*PREPARE, "--out=own"])
    sentence = refusal([*PREPARE, "--out=own", "--data.modality=mri"], capsys)
    assert "own was prepared with modality none, and modality is mri now; give another" in sentence


@pytest.mark.slow
def test_results_of_features_among_the_volumes_leave_them(work: Path) -> None:
    before = contents(work / "images")
    main([*FEATURES, "--weights=net/backbone.safetensors", "--out=images"])
    after = contents(work / "images")
    assert {name: after[name] for name in before} == before
    main([*PREPARE, "--out=out"])
    assert len(json.loads(Path("out/index.json").read_text())["names"]) == 4


@pytest.fixture
def odd(work: Path) -> Path:
    """A folder of volumes, labels and weights with spaces and letters of several alphabets."""
    folder = Path("Größe 1/räume 日本")
    for kind in ("images", "labels", "net"):
        shutil.copytree(kind, folder / kind)
        shutil.rmtree(kind)
    return folder


def test_odd_paths_of_tools(odd: Path) -> None:
    weights = f"--weights={odd / 'net' / 'backbone.safetensors'}"
    roots = [f"root={odd / 'images'}", f"label_root={odd / 'labels'}"]
    main(["prepare", *(f"--data.{one}" for one in roots), f"--out={odd / 'p q'}", "--workers=1"])
    assert (odd / "p q" / "index.json").is_file()
    main(["export", "--format=torchscript", weights, f"--out={odd / 'é ü' / 'net.ts'}"])
    assert (odd / "é ü" / "net.ts").is_file()
    main(["features", *(f"--{one}" for one in roots), weights, f"--out={odd}", "--samples=20"])
    assert (odd / "features.csv").is_file()


@pytest.mark.slow
def test_odd_paths_of_a_run(odd: Path) -> None:
    words = [f"{ROOT}={odd / 'images'}", f"--data.label_root={odd / 'labels'}"]
    words += [f"--trainer.logger.save_dir={odd / 'r s'}"]
    main([*FIT, *words, f"{MODEL}.weights={odd / 'net' / 'backbone.safetensors'}"])
    checkpoint = odd / "r s" / "x" / "version_0" / "checkpoints" / "last.ckpt"
    words += ["--trainer.callbacks=PredictionWriter", f"--trainer.callbacks.folder={odd / 'o ö'}"]
    main(["predict", *TRANSFER, *words, f"--ckpt_path={checkpoint}"])
    assert len(list((odd / "o ö").glob("case?.nii.gz"))) == 4


# Full disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [15_000, slow(20)])
@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("onnx", "pt2")])
def test_disk_full_in_export(format: Any, size: int, work: Path, capsys: Capture) -> None:
    net = "dynunet" if format == "nnunet" else "net"
    out = f"out/net{FORMATS[format].suffix}"
    words = ["export", f"--format={format}", f"--weights={net}/backbone.safetensors"]
    with full_disk(size):
        assert refusal([*words, f"--out={out}"], capsys) == f"{work / out} {FULL}"
    main([*words, f"--out={out}"])  # as the sentence says
    with full_disk(size):
        sentence = refusal([*words, f"--out={out}", "--overwrite=true"], capsys)
    assert sentence == f"{work / out} {FULL}"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_disk_full_in_slow_exports(format: Any, work: Path, capsys: Capture) -> None:
    words = ["export", f"--format={format}", "--weights=net/backbone.safetensors"]
    with full_disk(20):  # the network is converted before there is something to write
        sentence = refusal([*words, f"--out=out/net.{format}"], capsys)
    assert sentence == f"{work}/out/net.{format} {FULL}"


@pytest.mark.parametrize(
    ("size", "named", "workers"),
    [
        (6_000, f".npy {NO_SPACE}", 1),
        slow(6_000, f".npy {NO_SPACE}", 2),
        slow(20, f"settings.json {FULL}", 1),
        slow(20_000, f"contact_sheet.png {FULL}", 1),
    ],
    ids=["volume", "volume, two processes", "settings", "picture"],
)
def test_disk_full_in_prepare(
    size: int, named: str, workers: int, work: Path, capsys: Capture
) -> None:
    words = [*PREPARE[:-1], f"--workers={workers}", "--out=out"]
    with full_disk(size):
        sentence = refusal(words, capsys, left=("out",))
    assert sentence.startswith(f"{work}/out/")
    assert sentence.endswith(named)
    main(words)
    whole = contents(work / "out")
    shutil.rmtree("out")
    main(words)
    again = contents(work / "out")
    assert whole.keys() == again.keys()
    assert not list(Path("out").rglob("*.partial"))
    assert all(again[path] == whole[path] for path in whole if path.endswith(".npy"))


def test_disk_full_keeps_what_was_prepared(work: Path, capsys: Capture) -> None:
    main([*PREPARE, "--out=out"])
    shutil.copy("images/case0.nii.gz", "images/new.nii.gz")
    with full_disk(6_000):
        sentence = refusal([*PREPARE, "--out=out"], capsys, left=("out/volumes/new.label.npy",))
    assert sentence == f"{work}/out/volumes/new.npy {NO_SPACE}"


@pytest.mark.slow
def test_disk_full_in_features(work: Path, capsys: Capture) -> None:
    words = [*FEATURES, "--weights=net/backbone.safetensors", "--out=out"]
    main(words)
    with full_disk(100):
        assert refusal(words, capsys) == f"out/features.csv {FULL}"


def test_disk_full_in_predict(work: Path, capsys: Capture) -> None:
    words = [*PREDICT, "--trainer.logger=false", "--trainer.callbacks=PredictionWriter"]
    with full_disk(60):
        sentence = refusal([*words, "--trainer.callbacks.folder=own"], capsys, left=("own",))
    assert sentence.startswith("own/manifest.jsonl cannot be written")
    assert list(Path("own").glob("*.nii.gz")) == []
    main([*words, "--trainer.callbacks.folder=own"])
    assert len(list(Path("own").glob("*.nii.gz"))) == 4
    replace = ["--trainer.callbacks.folder=own", "--trainer.callbacks.overwrite=true"]
    with full_disk(60):
        assert refusal([*words, *replace], capsys).startswith("own/manifest.jsonl")


@pytest.mark.parametrize(
    ("size", "named"),
    [slow(20, "test_cases.csv"), slow(1_000, "test_cases.png")],
)
def test_disk_full_in_test(size: int, named: str, work: Path, capsys: Capture) -> None:
    words = ["test", *PREDICT[1:], "--trainer.logger=false"]
    main(words)
    with full_disk(size):
        assert refusal(words, capsys) == f"{work / named} {FULL}"


@pytest.mark.parametrize(
    ("command", "size", "named"),
    [
        ("fit, transfer", 100, "/config.yaml"),
        slow("fit, pre-training", 100, "/config.yaml"),
        slow("fit, pre-training", 20_000, "/figures/matching_step=000001.png"),
        slow("test", 20, ""),  # hyper-parameters: Lightning's error names no file
    ],
)
def test_disk_full_in_a_run(
    command: str, size: int, named: str, work: Path, capsys: Capture
) -> None:
    words = RESUMED[command]
    if command == "test":
        words = [*words, "--ckpt_path=segmentation.ckpt"]
    with full_disk(size):
        sentence = refusal(words, capsys, left=("runs",))
    assert sentence == f"runs/x/version_0{named} {FULL}"
    assert not list(Path("runs").rglob("*.png"))
    assert not list(Path("runs").rglob("*.partial"))


def test_disk_full_in_a_benchmark(work: Path, capsys: Capture) -> None:
    Path("task.yaml").write_text("trainer: null\n")
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN))
    (run,) = Plan.read("plan.yaml").runs(Path("out"), [])
    run.folder.mkdir(parents=True)
    result = {
        "words": list(run.words),
        "files": run.files(),
        "config": run.fingerprint(),
        "version": "0",
        "seconds": 1.0,
        "steps": 1,
        "validations": [{"step": 0, "val/dice": 0.5}],
        "scores": {"test/dice": 0.5},
        "interval": [0.4, 0.6],
        "cases": [],
    }
    (run.folder / "result.json").write_text(json.dumps(result))
    words = ["benchmark", "--config=plan.yaml", "--out=out"]
    with full_disk(50):
        sentence = refusal(words, capsys, left=("out/.lock",))
    assert sentence == f"out/results.csv {FULL}"
    main(words)
    with full_disk(50):
        assert refusal(words, capsys) == f"out/results.csv {FULL}"


def test_disk_full_in_profile(work: Path, capsys: Capture) -> None:
    words = [
        "profile",
        *PRETRAIN,
        "--data.patch_size=[16, 16, 16]",
        "--repeats",
        "1",
        "--json=a.json",
    ]
    with full_disk(50):
        sentence = refusal([*words, "--json=a.json"], capsys)
    assert sentence == f"a.json {FULL}"


# The same with real disks and processes -----------------------------------------------------------


def _commands(out: str) -> dict[str, list[str]]:
    """Words of each command that writes into a folder."""
    run = [f"--trainer.logger.save_dir={out}/runs"]
    writer = ["--trainer.logger=false", "--trainer.callbacks=PredictionWriter"]
    weights = "--weights=net/backbone.safetensors"
    return {
        "fit": ["fit", *PRETRAIN, *run],
        "predict": [*PREDICT, *writer, f"--trainer.callbacks.folder={out}/predictions"],
        "prepare": [*PREPARE, f"--out={out}/prepared"],
        "features": [*FEATURES, weights, f"--out={out}/features"],
        "export": ["export", weights, "--format=torchscript", f"--out={out}/net.ts"],
        "benchmark": [
            *("benchmark", f"--config={CONFIGS / 'benchmark' / 'phantom_smoke.yaml'}"),
            f"--out={out}/benchmark",
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("size=4k", "(No space left on device); make room there"),
        ("ro", "; correct its permissions"),
    ],
    ids=["full", "read-only"],
)
def test_real_disk(options: str, reason: str, work: Path) -> None:
    Path("disk").mkdir()
    script = f'mount -t tmpfs -o {options} none disk && exec "$@"'
    mounted = ["unshare", "-rm", "sh", "-c", script, "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*mounted, "true"], check=False).returncode
    ):
        pytest.skip("this process may mount nothing")
    for name, words in _commands("disk").items():
        if name == "benchmark" and options != "ro":
            continue  # its runs fail as fit does
        command = [sys.executable, "-m", "gvsl_lightning", *words]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [*mounted, *command],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        assert done.returncode == 2, (name, done.stderr)
        assert "Traceback" not in done.stderr
        *_, last = done.stderr.splitlines()
        assert last.startswith("error: "), name
        assert "disk" in last
        assert reason in last, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["fit", *PRETRAIN, "--ckpt_path=segmentation.ckpt"],
        ["fit", *TRANSFER, "--model.weights=file"],
        [*PREDICT, "--trainer.callbacks=PredictionWriter", "--trainer.callbacks.folder=images"],
        [*PREPARE, "--out=file"],
    ],
    ids=["checkpoint", "weights", "predict", "prepare"],
)
def test_process(words: list[str], work: Path) -> None:
    before = contents(work)
    command = [sys.executable, "-m", "gvsl_lightning", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert contents(work) == before
