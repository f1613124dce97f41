"""The same seed gives the same run, bit by bit: loader processes, cache, resuming, determinism."""

import csv
import inspect
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_info, threadpool_limits
from torch.utils._python_dispatch import TorchDispatchMode

from gvsl_lightning import tasks
from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules import Phantom, PhantomClassification, PhantomSegmentation
from gvsl_lightning.nn import deterministic, geometry
from gvsl_lightning.nn.losses import SIMILARITIES, voxel_cross_entropy
from gvsl_lightning.phantom import generate_phantom
from gvsl_lightning.runs.files import TABLES
from gvsl_lightning.tasks import deep_cluster

CONFIGS = Path(__file__).parents[2] / "configs"
Values = dict[tuple[int, str], str]


def logged(folder: Path) -> Values:
    """(Step, metric) -> value as it was written, which has all its digits."""
    found = {}
    for path in (folder / name for name in TABLES if (folder / name).exists()):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                named = {name: value for name, value in row.items() if value and name != "step"}
                found |= {(int(row["step"]), name): value for name, value in named.items()}
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of hearts with label maps, a table of classes, and the hearts prepared."""
    root = tmp_path_factory.mktemp("data")
    affine = np.diag([-1.3, 1.1, 1.2, 1.0])
    rows = ["path,label"]
    for kind in ("images", "labels"):
        (root / kind).mkdir()
    for number in range(8):
        subject = generate_phantom("cardiac_ct", number, (18, 20, 22))
        name = f"case_{number}.nii.gz"
        rows.append(f"images/{name},{number % 2}")
        for kind, array in (("images", subject["image"]), ("labels", subject["label"])):
            dtype = np.float32 if kind == "images" else np.int16
            nibabel.save(
                nibabel.Nifti1Image(np.asarray(array).squeeze().astype(dtype), affine),
                root / kind / name,
            )
    (root / "classes.csv").write_text("\n".join(rows))
    for out, labels in (("prepared", [f"--data.label_root={root / 'labels'}"]), ("volumes", [])):
        words = [f"--data.root={root / 'images'}", *labels, *PREPARED, f"--out={root / out}"]
        main(["prepare", *words, "--workers=1", "--dtype=float32"])
    return root


PREPARED = ["--data.modality=mri", "--data.spacing=[1.2,1.2,1.2]"]
CLASSES = f"[{', '.join(['background', *(f'part {number}' for number in range(1, 8))])}]"
SHARED = [
    *("--trainer.max_steps=5", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    "--trainer.callbacks=[{class_path: ResumableCheckpoint, init_args: "
    "{every_n_train_steps: 1, save_top_k: -1, filename: '{step}'}}]",
    "--model.backbone_options={channels: [8, 16]}",
    *("--data.modality=mri", "--data.spacing=[1.2,1.2,1.2]"),
    "--data.batch_size=2",
]
TRANSFER = [
    *("--model.mode=scratch", "--data.labelled=5", "--data.val=2"),
    *("--data.test=0", "--data.cache=false"),
    "--data.augmentation=true",
]
# three batches are an epoch
RUNS = {
    "pre-training": [
        f"--config={CONFIGS / 'quickstart.yaml'}",
        *("--data=PretrainDataModule", "--data.root={data}/images"),
        *("--data.label_root={data}/labels", "--data.patch_size=[16,16,16]"),
        *("--data.val_count=2", "--model.affine_channels=8"),
    ],
    "segmentation": [
        f"--config={CONFIGS / 'finetune' / 'phantom_segmentation.yaml'}",
        *("--data=SegmentationDataModule", "--data.root={data}/images"),
        *("--data.label_root={data}/labels", "--data.patch_size=[16,16,16]"),
        *(f"--data.class_names={CLASSES}", f"--model.class_names={CLASSES}"),
        *TRANSFER,
    ],
    "classification": [
        f"--config={CONFIGS / 'finetune' / 'phantom_classification.yaml'}",
        *("--data=ClassificationDataModule", "--data.root={data}/classes.csv"),
        *("--data.class_names=[a, b]", "--model.class_names=[a, b]"),
        *("--data.size=[16,16,16]", *TRANSFER),
    ],
}
READ_PREPARED = {
    "pre-training": ["root={data}/prepared", "label_root=null"],
    "segmentation": ["prepared={data}/prepared"],
    "classification": ["prepared={data}/volumes"],
}
URL = ["root=file://{data}/prepared", "label_root=null"]
BROKEN = 2  # a step inside the first epoch


class Runs:
    """Runs of one kind, each in a folder of its own, and the plain one that others shall equal."""

    def __init__(self, kind: str, data: Path, folder: Path) -> None:
        self.kind, self.data, self.folder = kind, data, folder
        self.count = 0
        self.plain = self.fit()

    def fit(self, *options: str) -> Values:
        """Train with options of the data, such as ``cache=true``, or others that begin with --."""
        words = [*RUNS[self.kind], *SHARED, *READ_PREPARED[self.kind] * ("prepared" in options)]
        words += [option for option in options if option != "prepared"]
        words += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={self.folder}"]
        words += ["--trainer.logger.name=", f"--trainer.logger.version={self.count}"]
        words = [word if word[0] == "-" else f"--data.{word}" for word in words]
        main(["fit", *(word.replace("{data}", str(self.data)) for word in words)])
        self.count += 1
        return logged(self.folder / f"version_{self.count - 1}")

    def resume(self, step: int, *options: str) -> Values:
        """The same from a checkpoint of the plain run."""
        checkpoint = self.folder / "version_0" / "checkpoints" / f"step={step}.ckpt"
        return self.fit(f"--ckpt_path={checkpoint}", *options)

    def rest(self, step: int) -> Values:
        """Values of the plain run from a step on."""
        return {(at, name): value for (at, name), value in self.plain.items() if at >= step}


@pytest.fixture(scope="module", params=RUNS)
def runs(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    return Runs(request.param, data, tmp_path_factory.mktemp("runs"))


def test_losses_do_not_depend_on_loader_processes_and_cache(runs: Runs) -> None:
    assert sum(name == "train/loss" for _, name in runs.plain) == 5
    assert runs.fit("cache=true", "num_workers=2") == runs.plain


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_losses_depend_on_no_option_that_only_says_how_data_are_read(
    runs: Runs, workers: int, threads: int
) -> None:
    """But on the number of threads, by which sums are rounded."""
    torch.set_num_threads(threads)
    try:
        plain = runs.plain if threads == 1 else runs.fit()
        ways = [[], ["cache=true"], ["prepared"], ["prepared", "cache=true"]]
        if runs.kind == "pre-training":
            ways += [URL, [*URL, "cache_folder={data}/copies"]]
        for way in ways:
            assert runs.fit(*way, f"num_workers={workers}") == plain, way
    finally:
        torch.set_num_threads(1)


def test_a_run_resumed_inside_an_epoch_goes_on_as_the_unbroken_one(runs: Runs) -> None:
    check_resumed(runs, BROKEN, "prepared", "num_workers=1")


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [[], ["cache=true", "num_workers=2"]])
def test_a_run_resumed_anywhere_goes_on_as_the_unbroken_one(
    runs: Runs, step: int, options: list[str]
) -> None:
    check_resumed(runs, step, *options)


def check_resumed(runs: Runs, step: int, *options: str) -> None:
    resumed, rest = runs.resume(step, *options), runs.rest(step)
    assert {key: resumed[key] for key in rest} == rest


def test_every_checkpoint_records_the_seed(runs: Runs) -> None:
    for path in (runs.folder / "version_0" / "checkpoints").iterdir():
        assert torch.load(path, weights_only=True)["record"]["seed"] == 0


class Losses(pl.Callback):
    """Remembers the loss of every step, and writes checkpoints."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *outputs: Any) -> None:
        self.values.append(float(outputs[1]["loss"]))
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_dropout_is_the_same_after_a_resume_and_with_loader_processes(tmp_path: Path) -> None:
    def run(num_workers: int, **options: Any) -> list[float]:
        pl.seed_everything(3, verbose=False)
        dropping = {"features": [8] * 6, "dropout": 0.5}
        task = tasks.GVSL(backbone="basic_unet", backbone_options=dropping, affine_channels=8)
        losses = Losses(None if options else tmp_path)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=4, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[losses],
            limit_val_batches=1,
        )  # fmt: skip
        data = Phantom(size=(16,) * 3, num_train=6, num_val=2, num_workers=num_workers)
        trainer.fit(task, data, weights_only=True, **options)
        return losses.values

    whole = run(0)
    assert run(1, ckpt_path=tmp_path / "2.ckpt") == whole[2:]
    assert len(set(whole)) == 4


def test_clusters_do_not_depend_on_the_order_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more than two threads add up, it differs from run to run: one does."""
    threads: list[int] = []

    class Watched(deep_cluster.KMeans):  # type: ignore[misc]
        def fit(self, *args: Any) -> Any:
            pools = [pool for pool in threadpool_info() if pool["user_api"] == "openmp"]
            threads.extend(pool["num_threads"] for pool in pools)
            return super().fit(*args)

    monkeypatch.setattr(deep_cluster, "KMeans", Watched)
    with threadpool_limits(4):
        vectors = np.random.default_rng(0).normal(size=(40, 8))
        deep_cluster.assign_clusters(vectors, clusters=3, components=4, seed=0)
    assert threads
    assert set(threads) == {1}


OPTIONS: dict[str, dict[str, Any]] = {
    "GVSL": {"affine_channels": 8},
    "DeepCluster": {"clusters": 2},
    "MaskedAutoencoder": {"block": 4},
    "Classification": {"class_names": ["healthy", "lesions"], "mode": "scratch"},
    "Segmentation": {
        "class_names": PhantomSegmentation("chest_ct", (16,) * 3).class_names,
        "mode": "scratch",
        "loss": "dice_ce",
        "window_size": (16, 16, 16),
    },
    "VoCo": {"grid": (2, 2, 1)},
}
TASKS = {
    name: (task, OPTIONS.get(name, {}))
    for name in tasks.__all__
    if not inspect.isabstract(task := getattr(tasks, name))
}
VARIANTS = {
    **{f"GVSL {name}": {"similarity": name} for name in SIMILARITIES if name != "ncc"},
    "GVSL contrast": {"weight_contrast": 0.1},
    "GVSL affine first": {"composition": "affine_first"},
    "Segmentation focal": {"loss": "focal"},
}
for name, options in VARIANTS.items():
    task, of_task = TASKS[name.split()[0]]
    TASKS[name] = task, {**of_task, **options}
SLOW = ("GVSL mi", "GVSL mind", "GVSL ssim", "GVSL affine first")
every_task = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TASKS]
)

# What torch.use_deterministic_algorithms refuses on a GPU, in torch 2.5 or later ones
REFUSED = (
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward"),
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "max_pool3d_with_indices_backward"),
    *("fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("reflection_pad3d_backward", "nll_loss2d_forward", "_ctc_loss_backward"),
    *("_embedding_bag_dense_backward", "put_", "put", "histc", "median", "kthvalue"),
)


class Operations(TorchDispatchMode):
    """Collects the operations that would be refused on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None) -> Any:
        name = operation.overloadpacket.__name__
        adds_up = name == "cumsum" and args[0].is_floating_point()
        weighs = name == "bincount" and len(args) > 1 and args[1] is not None
        multiplies = name.startswith("scatter_reduce") and args[4] == "prod"
        if name in REFUSED or adds_up or weighs or multiplies:
            self.refused.add(name)
        self.count += 1
        return operation(*args, **(kwargs or {}))


def train_deterministically(name: str, **options: Any) -> tuple[list[float], dict[str, float]]:
    """Losses of two steps of a task, and what the validation behind them logs."""
    task, task_options = TASKS[name]
    pl.seed_everything(0, verbose=False)
    size = {"size": (16, 16, 16), "batch_size": 2}
    if task is tasks.Segmentation:
        data: pl.LightningDataModule = PhantomSegmentation("chest_ct", count=6, val=2, **size)
    elif task is tasks.Classification:
        data = PhantomClassification(count=8, val=4, **size)
    else:
        data = Phantom(num_train=4, num_val=2, val_pairs=2, **size)
    losses = Losses()
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "deterministic": True, "max_steps": 2, **options},
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[losses],
    )  # fmt: skip
    model = task(backbone_options={"channels": [8, 16]}, **task_options)
    trainer.fit(model, data)
    return losses.values, {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.mark.usefixtures("_determinism")
@every_task
def test_every_task_is_deterministic_and_uses_nothing_else(name: str) -> None:
    with Operations() as operations:
        losses, scores = train_deterministically(name)
    assert operations.count > 100
    # of AUROC, which is computed on the CPU
    assert operations.refused == ({"cumsum"} if TASKS[name][0] is tasks.Classification else set())
    again, scores_again = train_deterministically(name)
    assert (len(losses), again) == (2, losses)
    np.testing.assert_equal(scores_again, scores)


@pytest.mark.usefixtures("_determinism")
def test_refused_operations_are_found() -> None:
    volume = torch.rand(1, 1, 4, 4, 4, requires_grad=True)
    torch.use_deterministic_algorithms(False)
    with Operations() as operations:
        doubled = F.interpolate(deterministic.max_pool(volume), scale_factor=2, mode="trilinear")
        moved = geometry.warp(doubled, torch.rand(1, 3, 4, 4, 4))
        classes = torch.cat([moved, -moved], dim=1)
        voxel_cross_entropy(classes, torch.zeros(1, 1, 4, 4, 4).long()).backward()
        torch.rand(3).cumsum(0)
        torch.ones(3).long().cumsum(0)
    assert operations.refused == {
        "max_pool3d_with_indices_backward",
        "upsample_trilinear3d_backward",
        "grid_sampler_3d_backward",
        "nll_loss2d_forward",
        "cumsum",
    }


@pytest.mark.usefixtures("_determinism")
@pytest.mark.parametrize("function", [deterministic.max_pool, deterministic.upsample])
def test_sizes_are_halved_and_doubled_alike_deterministically(function: Any) -> None:
    volume = torch.rand(2, 3, 4, 6, 2, requires_grad=True)

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        values = function(volume)
        weights = torch.linspace(0, 1, values.numel()).view_as(values)
        return values, torch.autograd.grad((values * weights).sum(), volume)[0]

    expected = compute()
    torch.use_deterministic_algorithms(True)
    for found, value in zip(compute(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


class Refused(tasks.GVSL):
    """Does what PyTorch refuses on a CPU, too."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("_determinism")
def test_what_cannot_be_deterministic_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks.GVSL, "training_step", Refused.training_step)
    words = ["fit", f"--config={CONFIGS / 'quickstart.yaml'}", "--trainer.deterministic=true"]
    words += ["--data.size=[16, 16, 16]", "--trainer.logger=false"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"])
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        sentence == "error: put_ is not deterministic; set trainer.deterministic to warn or false."
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("_determinism")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_deterministic_on_a_gpu(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning sets it, too, but not before other tests of this process
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = {"accelerator": "gpu", "precision": precision}
    losses, scores = train_deterministically(name, **device)
    again, scores_again = train_deterministically(name, **device)
    assert (len(losses), again) == (2, losses)
    assert np.isfinite(losses).all()
    np.testing.assert_equal(scores_again, scores)
