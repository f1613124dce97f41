"""No file that comes from elsewhere runs code, and no name does harm where it is shown."""

import ast
import csv
import hashlib
import json
import pickle
import shlex
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from monai.apps.datasets import DecathlonDataset
from safetensors.torch import save_file

import gvsl_lightning
from gvsl_lightning.benchmark.case_scores import read_cases
from gvsl_lightning.benchmark.comparison import write_tables
from gvsl_lightning.benchmark.report import report_page
from gvsl_lightning.benchmark.submission import slurm_lines
from gvsl_lightning.callbacks.registration_table import read_rows, write_rows
from gvsl_lightning.callbacks.reporting import write_cases
from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules import Decathlon
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.feature_figures import draw_features
from gvsl_lightning.export.bundle import write_bundle
from gvsl_lightning.export.exported import load_model
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.runs.files import cell_text, csv_cell
from gvsl_lightning.weights import save_backbone

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = f"--config={CONFIGS / 'quickstart.yaml'}"
VOLUMES = f"--config={CONFIGS / 'pretrain' / 'gvsl.yaml'}"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture
def harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that must not appear."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "harm"
    yield path
    assert not path.exists()


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2, printed
    assert "Traceback" not in printed
    (sentence,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return sentence


def volumes(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        array = np.random.default_rng(number).random((16, 16, 16), np.float32)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"case_{number}.nii.gz")
    return folder


class TestSource:
    """Calls that the code never makes."""

    SOURCES = sorted(Path(gvsl_lightning.__file__).parent.rglob("*.py"))

    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
    def test_no_call_runs_a_text_or_a_shell_or_unpacks_an_archive(self, path: Path) -> None:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {option.arg: option.value for option in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__"), called
            assert called not in ("os.system", "os.popen", "yaml.load", "pickle.load"), called
            assert called.rpartition(".")[2] not in ("extractall", "unpack_archive"), called
            assert "shell" not in options
            if called == "pickle.loads":  # of what the process itself has pickled
                assert path.stem == "source"
            if called == "torch.load":
                assert ast.unparse(options["weights_only"]) == "True"
            if called == "np.load":
                assert ast.unparse(options["allow_pickle"]) == "False"


class TestPickle:
    @pytest.fixture(params=["new", "old", "raw"])
    def bomb(self, request: pytest.FixtureRequest, harm: Path, tmp_path: Path) -> Path:
        path = tmp_path / "bomb.ckpt"
        content = {"state_dict": {"x": torch.zeros(1)}, "hyper_parameters": {"x": Bomb(harm)}}
        if request.param == "raw":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=request.param == "new")
        return path

    @pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
    def test_a_checkpoint(
        self, command: str, bomb: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "bomb.ckpt" in complaint([command, QUICKSTART, f"--ckpt_path={bomb}"], capsys)

    def test_weights_of_tools(self, bomb: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["features", "--root=nowhere", f"--weights={bomb}"]
        assert "bomb.ckpt" in complaint(words, capsys)
        words = ["export", f"--weights={bomb}", "--format=torchscript", "--out=out.ts"]
        assert str(bomb) in complaint(words, capsys)

    def test_weights_of_a_fine_tuning(self, bomb: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [
            *("fit", f"--config={CONFIGS / 'finetune' / 'phantom_segmentation.yaml'}"),
            *(f"--model.weights={bomb}", "--trainer.logger=false"),
            *("--data.size=[16,16,16]", "--data.count=6"),
            *("--model.mode=finetune", "--trainer.accelerator=cpu"),
            *("--data.val=2", "--data.test=1", "--data.labelled=2"),
        ]
        assert "bomb.ckpt" in complaint(words, capsys)

    def test_a_checkpoint_behind_a_url(
        self,
        bomb: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Which Lightning would unpickle."""
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
        monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/{bomb.name}"
            words = ["validate", QUICKSTART, f"--ckpt_path={url}", "--trainer.logger=false"]
            words += ["--data.size=[16,16,16]", "--data.num_val=2"]
            assert url in complaint(words, capsys)
            server.shutdown()

    def test_nobody_switches_it_off(self, bomb: Path, capsys: pytest.CaptureFixture[str]) -> None:
        url = "http://127.0.0.1:9/bomb.ckpt"
        words = ["fit", QUICKSTART, f"--ckpt_path={url}", "--weights_only=false"]
        assert "weights_only" in complaint(words, capsys)

    def test_numpy_files_lists_and_splits(
        self, harm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        objects = np.array([Bomb(harm)], dtype=object).reshape(1, 1, 1)
        folder = volumes(tmp_path / "volumes")
        np.save(folder / "bomb.npy", objects, allow_pickle=True)
        words = ["fit", VOLUMES, f"--data.root={folder}", "--trainer.logger=false"]
        assert "bomb.npy" in complaint(words, capsys)
        for name in ("list.json", "list.txt"):
            Path(name).write_bytes(pickle.dumps([Bomb(harm)]))
            assert name in complaint([*words[:2], f"--data.root={name}"], capsys)
        words = [
            *("fit", f"--config={CONFIGS / 'finetune' / 'phantom_segmentation.yaml'}"),
            *("--data.split_file=list.json", "--trainer.logger=false"),
            *("--model.mode=scratch", "--model.weights=null"),
        ]
        assert "list.json" in complaint(words, capsys)

    def test_prepared_volumes(
        self, harm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = volumes(tmp_path / "volumes")
        main(["prepare", f"--data.root={folder}", "--out=prepared", "--workers=1"])
        objects = np.array([Bomb(harm)], dtype=object).reshape(1, 1, 1, 1)
        for path in Path("prepared", "volumes").glob("*.npy"):
            np.save(path, objects, allow_pickle=True)
        words = ["fit", VOLUMES, "--data.root=prepared", "--trainer.logger=false"]
        words += ["--data.modality=none", "--data.num_workers=0"]
        words += ["--data.spacing=null", "--data.crop_foreground=null"]
        assert "prepared" in complaint(words, capsys)

    def test_a_stream(self, harm: Path, tmp_path: Path) -> None:
        litdata: Any = pytest.importorskip("litdata")
        from gvsl_lightning.datamodules import StreamDataModule

        items = [{"name": "a", "settings": "{}", "image": Bomb(harm)} for _ in range(2)]
        litdata.optimize(
            items.__getitem__, [0, 1], "stream", chunk_size=1, num_workers=1, start_method="fork"
        )
        index = json.loads(Path("stream", "index.json").read_text())
        assert "pickle" in index["config"]["data_format"]
        with pytest.raises(InputError, match="stream"):
            StreamDataModule("stream", patch_size=(8, 8, 8)).setup()


class TestClassPath:
    REFUSED = (
        "--model=os.system",
        "--model.class_path=subprocess.Popen",
        "--model=builtins.eval",
        "--model=torch.optim.Adam",
        "--model=MatchingFigure",
        "--data=os.system",
        "--data=GVSL",
        "--trainer.callbacks+={class_path: os.system, init_args: {command: touch harm}}",
        "--trainer.callbacks+={class_path: GVSL}",
        "--trainer.logger={class_path: os.system, init_args: {command: touch harm}}",
        "--trainer.plugins={class_path: os.system, init_args: {command: touch harm}}",
        "--trainer.strategy={class_path: os.system, init_args: {command: touch harm}}",
        "--trainer.profiler={class_path: os.system, init_args: {command: touch harm}}",
        # options of any type, in which jsonargparse would build whatever is named
        "--model.corruption={shuffling_rate: {class_path: os.system, "
        "init_args: {command: touch harm}}}",
        "--model.backbone_options={channels: {class_path: os.system, "
        "init_args: {command: touch harm}}}",
        "--model.backbone_options={class_path: os.system, init_args: {command: touch harm}}",
        "--data.scene={class_path: os.system, init_args: {command: touch harm}}",
    )

    @pytest.mark.parametrize("word", REFUSED)
    def test_nothing_but_what_an_option_is_for_is_built(
        self, word: str, harm: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["fit", QUICKSTART, "--trainer.logger=false", "--trainer.max_steps=0", word]
        complaint(words, capsys)

    def test_tags_of_yaml(self, harm: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("tag.yaml").write_text("seed_everything: !!python/object/apply:os.system [touch harm]")
        assert "tag.yaml" in complaint(["fit", QUICKSTART, "--config=tag.yaml"], capsys)

    @pytest.mark.parametrize(
        "transform",
        [
            "{class_path: os.system, init_args: {command: touch harm}}",
            "{class_path: torch.optim.Adam, init_args: {}}",
            # the name of a reader may be that of any function
            "{class_path: monai.transforms.LoadImaged, "
            "init_args: {keys: image, reader: os.system, command: touch harm}}",
            "{class_path: monai.transforms.SaveImaged, init_args: {keys: image}}",
        ],
    )
    def test_transforms(
        self, transform: str, harm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = volumes(tmp_path / "volumes")
        words = [f"--data.root={folder}", "--out=prepared", f"--data.transforms=[{transform}]"]
        assert "The transform" in complaint(["prepare", *words], capsys)

    @pytest.mark.parametrize(
        "hyper_parameters",
        [
            {"backbone_options": {"channels": {"class_path": "os.system"}}},
            {"_class_path": "os.system", "command": "touch harm"},
        ],
    )
    def test_hyper_parameters_of_a_checkpoint(
        self, hyper_parameters: Any, harm: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A checkpoint without pickled code, whose options the command line takes over."""
        options = hyper_parameters.get("backbone_options", {}).get("channels", {})
        if options:
            options["init_args"] = {"command": "touch harm"}
        torch.save({"state_dict": {}, "hyper_parameters": hyper_parameters}, "foreign.ckpt")
        words = ["validate", QUICKSTART, "--ckpt_path=foreign.ckpt", "--trainer.logger=false"]
        complaint(words, capsys)

    @pytest.mark.parametrize(
        "data",
        [
            {
                "transforms": [
                    {
                        "class_path": "monai.transforms.LoadImaged",
                        "init_args": {"reader": "os.system", "command": "touch harm"},
                    }
                ]
            },
            {"modality": "ct", "window": ["$__import__('os').system('touch harm')", 1]},
            {"modality": "none", "crop_foreground": "0, __import__('os').system('touch harm')"},
        ],
    )
    def test_a_card_that_a_bundle_is_made_of(self, data: Any, harm: Path, tmp_path: Path) -> None:
        backbone = build_backbone("unet", channels=[8, 16])
        path = save_backbone(backbone, tmp_path / "backbone.safetensors", {"data": data})
        with pytest.raises(InputError):
            write_bundle(load_model(str(path), size=(16, 16, 16)), tmp_path / "bundle")

    def test_names_of_classes_are_no_expressions_in_a_bundle(
        self, harm: Path, tmp_path: Path
    ) -> None:
        names = ["background", "$__import__('os').system('touch harm')"]
        backbone = build_backbone("unet", channels=[8, 16])
        card = {"task": {"class_names": names}, "data": {"modality": "ct"}}
        path = save_backbone(backbone, tmp_path / "backbone.safetensors", card)
        content = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        content["head.weight"], content["head.bias"] = torch.zeros(2, 8, 3, 3, 3), torch.zeros(2)
        save_file(content, path)
        with pytest.raises(InputError, match="__import__"):
            write_bundle(load_model(str(path), size=(16, 16, 16)), tmp_path / "bundle")


def test_a_downloaded_archive_leaves_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one of the right hash."""
    root = tmp_path / "root"
    root.mkdir()
    archive = root / "Task04_Hippocampus.tar"
    (tmp_path / "file").write_text("outside")
    with tarfile.open(archive, "w") as file:
        file.add(tmp_path / "file", "../outside")
    digest = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr("monai.apps.utils.get_filename_from_url", lambda url: Path(url).name)
    monkeypatch.setitem(DecathlonDataset.md5, "Task04_Hippocampus", digest)
    with pytest.raises(InputError, match="Task04_Hippocampus"):
        Decathlon(str(root), download=True).prepare_data()
    assert not (tmp_path / "outside").exists()


NAMES = (
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    '"a,b\n"',
    "+1+1",
    "@SUM(A1)",
    "a|b`c`",
    "Ärzte 心",
    "50$ or $\\frac$",
    "$(touch harm) 'x' \"y\"",
)


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_tables_of_cases_keep_names_and_hold_no_formula(
        self, name: str, tmp_path: Path
    ) -> None:
        write_cases(tmp_path / "test_cases.csv", [{"name": name, "dice a": -0.5}])
        rows = {name: {"pair": name, "fixed": name, "moving": name, "ncc_before": -0.5}}
        write_rows(tmp_path / "registration.csv", {name: {**rows[name], "folded": 0.0}})
        for path in tmp_path.glob("*.csv"):
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    cells = [cell for key, cell in row.items() if key in ("name", "pair", "fixed")]
                    assert all(cell[0] not in "=+-@\t\r" for cell in cells)
                    assert "-0.5" in row.values()  # a number stays one
        assert read_cases(tmp_path / "test_cases.csv") == [{"name": name, "dice a": -0.5}]
        ((pair, row),) = read_rows(tmp_path / "registration.csv").items()
        assert (pair, row["fixed"]) == (name, name)

    def test_a_mark_is_taken_off_again(self) -> None:
        for value in ("=1", "'=1", "'a", "", "'", "-"):
            assert cell_text(csv_cell(value)) == value or value == "'=1"
        assert csv_cell(-1.5) == -1.5

    def test_report_and_tables_of_a_comparison(self, tmp_path: Path) -> None:
        from gvsl_lightning.benchmark.comparison import Comparison
        from gvsl_lightning.benchmark.plan import Plan
        from gvsl_lightning.benchmark.training import Run

        config = tmp_path / "config.yaml"
        config.write_text("trainer: null\n")
        task = {"config": str(config), "metric": "test/dice", "monitor": "val/dice"}
        content = {
            "methods": {name: {"config": str(config)} for name in NAMES},
            "tasks": {NAMES[0]: task},
            "modes": {NAMES[5]: {"model.init_args.mode": "linear"}},
            "seeds": [0],
            "baseline": NAMES[0],
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        plan = Plan.read(path)

        class Fixed(Run):
            def result(self) -> dict[str, Any]:
                return {
                    "validations": [],
                    "scores": {"test/dice": 0.5},
                    "cases": [{"name": NAMES[0], "dice mean": 0.5}],
                    "steps": 1,
                    "seconds": 1.0,
                    "config": "c",
                    "version": "v",
                }

        runs = [
            Fixed(**{name: getattr(run, name) for name in run.__dataclass_fields__})
            for run in plan.runs(tmp_path / "out", [])
        ]
        comparison = Comparison(plan, runs)
        page = report_page(comparison, len(runs), {})
        assert "<script" not in page
        parser = _Texts()
        parser.feed(page)
        assert set(NAMES) <= set(parser.texts)
        write_tables(comparison, tmp_path)
        parts = (tmp_path / "table.md").read_text(encoding="utf-8").split("\n\n")
        tables = [part.splitlines() for part in parts if part.startswith("| ")]
        assert len(tables) == 3  # scores, steps, cost
        for rows in tables:
            plain = [row.replace("\\\\", "").replace("\\|", "") for row in rows]
            assert len({row.count("|") for row in plain}) == 1
        assert not any("<script" in line.replace("\\<", "") for line in rows)
        with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
            methods = [row["method"] for row in csv.DictReader(file)]
        assert {cell_text(method) for method in methods} == set(NAMES)
        assert not any(method[0] in "=+-@" for method in methods)

    def test_names_in_figures_are_no_formulas(self) -> None:
        volume = torch.rand(1, 8, 8, 8)
        colours = torch.zeros(3, 8, 8, 8)
        for name in NAMES:
            figure = draw_features([volume], {name: [colours]}, names=[name])
            figure.canvas.draw()

    @pytest.mark.parametrize("name", NAMES)
    def test_printed_commands_are_what_was_given(self, name: str, harm: Path) -> None:
        words = [f"--root={name}", name]
        lines = slurm_lines([_Planned()], ["benchmark", "--out", name], words)  # type: ignore[list-item]
        shell = (
            "sbatch() { for last; do :; done; SLURM_ARRAY_TASK_ID=7; "
            'python() { printf "%s\\0" "$@"; }; eval "${last#--wrap=}"; }\n'
        )
        printed = subprocess.run(
            ["bash", "-c", shell + lines], capture_output=True, encoding="utf-8", check=True
        ).stdout
        expected = ["-m", "gvsl_lightning", "benchmark", "--out", name, "--only", "7", *words]
        assert printed.split("\0")[:-1] == expected
        assert shlex.split(shlex.join(words)) == words


class _Planned:
    """A transfer that is left to do."""

    task = "task"
    needs = None

    def is_done(self) -> bool:
        return False


class _Texts(HTMLParser):
    """The texts of the cells of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._cell = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._cell = ""

    def handle_data(self, data: str) -> None:
        self._cell += data

    def handle_endtag(self, tag: str) -> None:
        self.texts.append(self._cell)
