"""Plans: the runs that follow from them, and their errors."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.benchmark.training import digest
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.weights import save_backbone
from plans import TASK, find, write


def test_every_method_is_pretrained_once_and_transferred_everywhere(tmp_path: Path) -> None:
    runs = Plan.read(write(tmp_path)).runs(tmp_path / "out", ["--extra=1"])
    assert len({run.folder for run in runs}) == len(runs) == 10
    for seed in (0, 1):
        pretraining = find(runs, "GVSL", "", "", seed)
        assert pretraining.words == (
            f"--config={tmp_path / 'pretrain.yaml'}",
            f"--seed_everything={seed}",
            "--extra=1",
        )
        for mode in ("linear", "fine-tuned"):
            assert find(runs, "Scratch", "hearts", mode, seed).needs is None
            run = find(runs, "GVSL", "hearts", mode, seed)
            assert run.needs is pretraining
            assert runs.index(pretraining) < runs.index(run)
            assert f"--model.weights={pretraining.backbone}" in run.words
    assert [run.seed for run in runs] == [0] * 5 + [1] * 5


def test_one_pretraining_may_serve_all_seeds(tmp_path: Path) -> None:
    runs = Plan.read(write(tmp_path, pretrain_seed=7)).runs(tmp_path / "out", [])
    assert len({run.folder for run in runs}) == len(runs) == 9
    (pretraining,) = [run for run in runs if not run.task]
    assert runs[0] == pretraining
    assert "--seed_everything=7" in pretraining.words
    transfers = [run for run in runs if run.method == "GVSL" and run.task]
    assert {run.seed for run in transfers} == {0, 1}
    assert {run.needs for run in transfers} == {pretraining}
    for run in transfers:
        assert f"--model.weights={pretraining.backbone}" in run.words


def test_changes_of_the_task_then_the_mode_then_the_method_then_the_words(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        methods={
            "GVSL": {
                "config": "pretrain.yaml",
                "pretrain": {"a": 2, "data": "Mine"},
                "transfer": {"linear": {"a": 3, "b": None}},
            }
        },
        tasks={"hearts": {**TASK, "changes": {"a": 1, "c": {"x": [1]}}}},
        modes={"linear": {"a": 2}, "tuned": {}},
        pretrain={"a": 1, "b": "text"},
        seeds=[7],
        baseline="GVSL",
    )
    pretraining, linear, tuned = Plan.read(path).runs(tmp_path / "out", ["--a=9"])
    assert pretraining.words[1:] == (
        *("--seed_everything=7", "--a=1", "--b=text", "--a=2", "--data=Mine", "--a=9"),
    )
    weights = f"--model.weights={pretraining.backbone}"
    assert linear.words[1:] == (
        "--seed_everything=7",
        *("--a=1", '--c={"x": [1]}', "--a=2", "--a=3", "--b=null", weights, "--a=9"),
    )
    assert tuned.words[2:] == ("--a=1", '--c={"x": [1]}', weights, "--a=9")


@pytest.mark.parametrize(
    ("place", "configured"), [("model", None), ("model.init_args", "finetune")]
)
def test_without_weights_fine_tuning_is_training_from_scratch(
    tmp_path: Path, configured: str | None, place: str
) -> None:
    modes = {
        "linear": {f"{place}.mode": "linear"},
        "tuned": {f"{place}.layer_decay": 0.8, "a": 1},
    }
    methods = {"Scratch": None, "Released": {"weights": "owner/name"}}
    path = write(tmp_path, modes=modes, methods=methods)
    if configured:
        model = {"init_args": {"mode": configured}}
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({"model": model}))
    plan = Plan.read(path)
    assert [mode for mode in plan.modes if plan.is_linear(mode)] == ["linear"]
    runs = plan.runs(tmp_path / "out", [])
    assert find(runs, "Scratch", "hearts", "linear", 0).words[2:] == (
        *(f"--{place}.mode=linear", "--model.weights=null"),
    )
    assert find(runs, "Scratch", "hearts", "tuned", 0).words[2:] == (
        *("--a=1", "--model.mode=scratch", "--model.weights=null"),
    )
    assert find(runs, "Released", "hearts", "tuned", 0).words[2:] == (
        *(f"--{place}.layer_decay=0.8", "--a=1", "--model.weights=owner/name"),
    )


def test_files_of_a_run_are_its_configuration_and_ready_weights(tmp_path: Path) -> None:
    weights = save_backbone(build_backbone("unet", channels=[4, 8]), tmp_path / "b.safetensors", {})
    path = write(tmp_path, methods={"Scratch": {}, "Released": {"weights": str(weights)}})
    run = find(Plan.read(path).runs(tmp_path / "out", []), "Released", "hearts", "linear", 0)
    files = (tmp_path / "task.yaml", weights)
    assert run.files() == {str(file): digest(file) for file in files}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"baseline": "BYOL"}, "baseline is 'BYOL'.* Scratch"),
        ({"tasks": {"a": {**TASK, "config": "no.yaml"}}}, r"tasks\.a\.config .*no\.yaml"),
        ({"budget": 3}, r"budget in .*plan\.yaml"),
        ({"methods": {"Scratch": {"wheights": "a"}}}, r"wheights in .*methods\.Scratch\.weights"),
        ({"seeds": None}, r"plan\.yaml lacks seeds"),
        ({"seeds": ["a"]}, r"seeds\.0 .*'a'"),
        ({"tasks": {"a": {**TASK, "metric": "val/dice"}}}, r"tasks\.a\.metric .*test/"),
        ({"tasks": {"a": {**TASK, "paper": "XYZ"}}}, r"tasks\.a\.paper .*'XYZ'.* SHC"),
        ({"tasks": {"a b": TASK, "a/b": TASK}}, "tasks .*a b, a/b"),
        ({"figures": {"pie": ["GVSL"]}}, "figures .*'pie'"),
        ({"methods": {"Scratch": {"weights": "a", "config": "task.yaml"}}}, r"methods\.Scratch "),
        ({"methods": {"Scratch": {"weights": "a.ckpt"}}}, r"methods\.Scratch\.weights .*a\.ckpt"),
        ({"methods": {"Scratch": {"transfer": {"probe": {}}}}}, r"Scratch\.transfer .*'probe'"),
    ],
)
def test_wrong_plans(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=key):
        Plan.read(write(tmp_path, **changes))


@pytest.mark.parametrize("content", [None, "a: [", "3", "methods: {}"])
def test_missing_and_unreadable_plans(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(InputError, match=r"plan\.yaml"):
        Plan.read(tmp_path / "plan.yaml")
