"""One, two and four processes on the CPU, which share the batches of one, train alike.

All that is trained here runs in one group of processes for each number of them, which starts once.
"""

import os
import socket
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import Dataset

from gvsl_lightning.callbacks import BackboneExporter, GradientNorms, MatchingFigure, NonFiniteGuard
from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import GVSL, SimSiam
from gvsl_lightning.weights import load_backbone

PAIRS = 4  # in a step, of all processes
STEPS = 6  # two epochs
SAVED = 4  # in the middle of the second one
STILL = {
    "scale": (1.0, 1.0),
    **dict.fromkeys(("translation", "rotation", "shear", "nonlinear_rate", "noise_rate"), 0.0),
}
SHARDED = {
    "unet": {"channels": [8, 16]},
    "swin_unetr": {"feature_size": 12},
}


class Volumes(Dataset[dict[str, Any]]):
    """Smooth noise; all volumes look alike if wanted."""

    def __init__(self, count: int, edge: int = 16, alike: bool = False) -> None:
        self.count = count
        self.edge = edge
        self.alike = alike

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0 if self.alike else index)
        coarse = torch.rand(1, 1, 5, 5, 5, generator=generator)
        image = F.interpolate(coarse, size=(self.edge,) * 3, mode="trilinear")[0]
        return {"image": image, "name": f"volume {index}"}


class Pairs(PairDataModule):
    volumes: Volumes

    def configure_datasets(self) -> tuple[Volumes, Volumes]:
        return self.volumes, Volumes(2, self.volumes.edge)


class Record(pl.Callback):
    """Keeps what a process trains on, and its losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.pairs: list[list[tuple[str, str]]] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        names = zip(batch["fixed_name"], batch["moving_name"], strict=True)
        self.pairs.append(list(names))


class Poisoned(GVSL):
    """A loss of the last process is NaN in one step."""

    def compute_losses(self, views: Any) -> Any:
        losses = super().compute_losses(views)
        if self.global_step == 1 and self.global_rank == self.trainer.world_size - 1:
            losses["total"] = losses["total"] * torch.nan
        return losses


class Nothing(pl.LightningModule):
    """Learns nothing from the pairs; keeps the volumes that GVSL would corrupt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.gvsl = [GVSL(backbone_options={"channels": [8, 16]}, affine_channels=8)]
        self.corrupted: list[Tensor] = []

    def training_step(self, batch: Any) -> Tensor:
        self.corrupted.append(self.gvsl[0].views_of(batch)["corrupted"])
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1)


class Group:
    """The work of one process of a group."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world, self.folder = rank, world, folder

    def fit(
        self,
        task: pl.LightningModule,
        volumes: Volumes,
        *callbacks: pl.Callback,
        checkpoint: Path | None = None,
        **options: Any,
    ) -> Record:
        record = Record()
        if self.world > 1:
            options = {"strategy": DDPStrategy(process_group_backend="gloo"), **options}
        trainer = pl.Trainer(
            devices=1,
            num_nodes=self.world,
            logger=False,
            enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[record, *callbacks],
            **{
                "accelerator": "cpu",
                "max_epochs": 2,
                "limit_val_batches": 0,
                "default_root_dir": self.folder,
                **options,
            },
        )
        data = Pairs(
            patch_size=(volumes.edge,) * 3,
            batch_size=PAIRS // self.world,
            val_pairs=2,
        )
        data.volumes = volumes
        trainer.fit(task, data, ckpt_path=checkpoint)
        return record

    def run(self, jobs: list[str]) -> None:
        for job in jobs:
            name, _, argument = job.partition(" ")
            content = getattr(self, name)(*argument.split())
            torch.save(content, self.folder / f"{name}-{self.rank}.pt")

    def losses(self) -> dict[str, Any]:
        """Of a step, with everything off that is drawn for the batch of a process as a whole."""
        tiny = {"backbone_options": {"channels": [8, 16]}, "learning_rate": 1e-3}
        torch.manual_seed(0)
        still = {"corruption": False, "spatial": False}
        gvsl = self.fit(GVSL(affine_channels=16, **still, **tiny), Volumes(12))
        torch.manual_seed(0)
        simsiam = self.fit(SimSiam(view=STILL, projection_channels=16, **tiny), Volumes(12))
        return {"gvsl": gvsl.losses, "simsiam": simsiam.losses}

    def epochs(self) -> dict[str, Any]:
        """Pairs of two epochs of as many volumes as can and cannot be shared evenly."""
        content = {}
        for count in (12, 10):
            volumes = Volumes(count, edge=8, alike=True)
            task = Nothing()
            record = self.fit(task, volumes)
            content[str(count)] = {"pairs": record.pairs, "corrupted": task.corrupted}
        return content

    def resumed(self) -> dict[str, Any]:
        """Losses and weights of an unbroken run and of one that resumes inside an epoch."""
        content = {}
        saver = ModelCheckpoint(
            self.folder, filename="{step}", save_top_k=-1, every_n_train_steps=1
        )
        for name, callbacks, checkpoint in (
            ("whole", [saver], None),
            ("resumed", [], self.folder / f"step={SAVED}.ckpt"),
        ):
            torch.manual_seed(0)
            task = GVSL(backbone_options={"channels": [8, 16]}, affine_channels=16)
            record = self.fit(task, Volumes(12), *callbacks, checkpoint=checkpoint)
            content[name] = {"losses": record.losses, "weights": task.state_dict()}
        return content

    def sharded(self, backbone: str) -> dict[str, Any]:
        """Losses with whole and with shared parameters, and how many each process keeps."""
        content: dict[str, Any] = {}
        kept = {"save_distributed_checkpoint": False, "process_group_backend": "gloo"}
        split = ModelParallelStrategy(1, self.world, **kept)
        try:
            self.fit(GVSL(backbone_options={"channels": [8, 16]}), Volumes(4), strategy=split)
        except InputError as error:
            content["split"] = str(error)
        sharing = ModelParallelStrategy(self.world, 1, **kept)
        for name, options in (("whole", {}), ("shared", {"strategy": sharing})):
            torch.manual_seed(0)
            task = GVSL(
                backbone=backbone,
                backbone_options=SHARDED[backbone],
                affine_channels=16,
                learning_rate=1e-3,
            )
            saver = ModelCheckpoint(self.folder / name, filename="last")
            callbacks = [saver, GradientNorms(), MatchingFigure(num_pairs=1), BackboneExporter()]
            given = {
                "max_epochs": 1,
                "gradient_clip_val": 1.0,
                "limit_val_batches": 1,
                "log_every_n_steps": 1,
                "default_root_dir": self.folder / name,
            }
            edge = 32 if backbone == "swin_unetr" else 16
            record = self.fit(task, Volumes(8, edge), *callbacks, **given, **options)
            parameters = [
                getattr(one, "to_local", lambda one=one: one)() for one in task.parameters()
            ]
            content[name] = {
                "losses": record.losses,
                "parameters": sum(one.numel() for one in parameters),
            }
        return content

    def poisoned(self) -> dict[str, Any]:
        """Errors of the processes after a loss is NaN in one of them, and weights after it."""
        content: dict[str, Any] = {}
        for policy in ("stop", "skip"):
            torch.manual_seed(0)
            tiny = {"backbone_options": {"channels": [8, 16]}, "affine_channels": 16}
            task = Poisoned(**tiny)
            try:
                record = self.fit(task, Volumes(12), NonFiniteGuard(policy))
                content["steps"] = len(record.losses)
            except InputError as error:
                content["sentence"] = str(error)
            content[policy] = task.state_dict()
        return content

    def synchronised(self, accelerator: str) -> dict[str, Any]:
        """Losses of a backbone with BatchNorm, and why there are none."""
        torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(0)
        options = {"norm": "batch", "features": [8, 8, 8, 8, 8, 8]}
        task = GVSL(backbone="basic_unet", backbone_options=options, affine_channels=16)
        try:
            record = self.fit(task, Volumes(12), accelerator=accelerator, sync_batchnorm=True)
        except ValueError as error:
            return {"error": str(error)}
        return {"losses": record.losses}


def _process(rank: int, world: int, port: int, folder: Path, jobs: list[str]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "RANK": str(rank),
        # as many machines with one device, so that all may share the one that there is
        "GROUP_RANK": str(rank),
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",  # Lightning starts no processes of its own
    }
    torch.set_num_threads(1)
    Group(rank, world, folder).run(jobs)


def start(world: int, folder: Path, *jobs: str) -> dict[str, list[Any]]:
    """Run jobs in a group of processes: the results by job, each a list by process."""
    if world == 1:
        Group(0, 1, folder).run(list(jobs))
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(
            _process, (world, port, folder, list(jobs)), nprocs=world, start_method="forkserver"
        )
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(world)]
        for name in (job.partition(" ")[0] for job in jobs)
    }


Run = dict[str, list[Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(1, tmp_path_factory.mktemp("alone"), "losses", "epochs")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    jobs = ["resumed", "sharded unet", "synchronised cpu", "poisoned"] if request.param == 2 else []
    folder = tmp_path_factory.mktemp(f"together{request.param}")
    return {**start(request.param, folder, "losses", "epochs", *jobs), "folder": [folder]}


two = pytest.mark.parametrize("together", [2], indirect=True)


@pytest.mark.parametrize("method", ["gvsl", "simsiam"])
def test_losses_are_those_of_one_process_with_the_same_global_batch(
    alone: Run, together: Run, method: str
) -> None:
    (expected,) = (result[method] for result in alone["losses"])
    losses = torch.tensor([result[method] for result in together["losses"]])
    assert len(expected) == len(set(expected)) == STEPS
    assert losses.mean(dim=0).tolist() == pytest.approx(expected, rel=1e-5)


def test_no_volume_is_left_out_and_none_comes_twice(alone: Run, together: Run) -> None:
    world = len(together["epochs"])
    for count in (12, 10):
        repeats = -count % world
        ranks = [result[str(count)]["pairs"] for result in together["epochs"]]
        epochs = [[list(chain(*steps)) for steps in _halves(rank)] for rank in ranks]
        for epoch in range(2):
            parts = [rank[epoch] for rank in epochs]
            assert {len(part) for part in parts} == {(count + repeats) // world}
            pairs = list(chain(*parts))
            fixed = Counter(pair[0] for pair in pairs)
            assert set(fixed) == {f"volume {index}" for index in range(count)}
            # the fewest that have to come twice, so that all processes have as many
            assert sorted(fixed.values()) == [1] * (count - repeats) + [2] * repeats
            assert all(first != second for first, second in pairs)
            if repeats == 0:
                (expected,) = (result[str(count)]["pairs"] for result in alone["epochs"])
                in_turns = list(chain(*zip(*parts, strict=True)))
                assert in_turns == list(chain(*_halves(expected)[epoch]))


def test_processes_corrupt_differently(together: Run) -> None:
    # the volumes look alike, so that what differs is the corruption and the spatial transform
    ranks = [result["12"]["corrupted"] for result in together["epochs"]]
    steps = [volumes.flatten(1) for rank in ranks for volumes in rank]
    corrupted = torch.cat(steps)
    assert len(corrupted) == 24
    assert len(corrupted.unique(dim=0)) == 24


@two
def test_a_loss_that_is_not_finite_in_one_process_is_one_of_all(together: Run) -> None:
    first, second = together["poisoned"]
    assert first["sentence"] == second["sentence"]
    assert first["sentence"].startswith("Step 1: train/loss is nan for volume ")
    # of the four pairs of the step, those of the one process that has it
    assert first["sentence"].split(";")[0].count("volume ") == PAIRS
    assert first["steps"] == second["steps"] == STEPS
    for policy in ("stop", "skip"):
        for name, value in first[policy].items():
            assert value.isfinite().all()
            assert torch.equal(value, second[policy][name])


@two
def test_two_processes_resume_inside_an_epoch_as_if_unbroken(together: Run) -> None:
    for result in together["resumed"]:
        whole, resumed = result["whole"], result["resumed"]
        assert len(set(whole["losses"])) == STEPS
        assert resumed["losses"] == whole["losses"][SAVED:]
        for name, value in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], value), name


def check_sharded(results: list[Any], folder: Path) -> None:
    for result in results:
        assert "set it to 1 and data_parallel_size to 2" in result["split"]
        whole, shared = result["whole"], result["shared"]
        assert len(set(whole["losses"])) == 2
        assert shared["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert shared["parameters"] == pytest.approx(whole["parameters"] / 2, rel=0.02)
    backbones = [
        load_backbone(folder / name / "backbone.safetensors") for name in ("whole", "shared")
    ]
    weights = [nn.utils.parameters_to_vector(backbone.parameters()) for backbone in backbones]
    # Adam's first steps are as long where the gradient is rounding as elsewhere
    assert (weights[1] - weights[0]).norm() < 0.02 * 2 * 1e-3 * len(weights[0]) ** 0.5
    saved = torch.load(folder / "shared" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in backbones[1].state_dict().items():
        assert torch.equal(saved[f"backbone.{name}"], value), name
    for name in ("whole", "shared"):
        assert len(list((folder / name / "figures").glob("matching*.png"))) == 1


@two
def test_processes_share_the_parameters(together: Run) -> None:
    check_sharded(together["sharded"], *together["folder"])


@pytest.mark.slow
def test_processes_share_the_parameters_of_swin_unetr(tmp_path: Path) -> None:
    check_sharded(start(2, tmp_path, "sharded swin_unetr")["sharded"], tmp_path)


@two
def test_batch_norm_is_not_synchronised_on_a_cpu(together: Run) -> None:
    for result in together["synchronised"]:
        assert result["error"] == "SyncBatchNorm layers only work with GPU modules"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_norm_sees_the_batches_of_all_processes(tmp_path: Path) -> None:
    results = []
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        results.append(start(world, tmp_path / str(world), "synchronised gpu")["synchronised"])
    (alone,), together = results
    losses = torch.tensor([result["losses"] for result in together])
    assert losses.mean(dim=0).tolist() == pytest.approx(alone["losses"], rel=1e-4)


def _halves(steps: list[Any]) -> tuple[list[Any], list[Any]]:
    return steps[: len(steps) // 2], steps[len(steps) // 2 :]
