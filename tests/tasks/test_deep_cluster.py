from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import DeepCluster
from gvsl_lightning.tasks.deep_cluster import assign_clusters


class Volumes(Dataset[dict[str, Any]]):
    """Two kinds of volumes, six of one and two of the other."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(index)
        image = 0.05 * torch.rand(1, 10, 8, 8, generator=random)
        image += (torch.arange(8) % 2) * 0.9 if index < 2 else (torch.arange(8) > 3) * 0.5
        return {"image": image, "name": f"volume {index}"}


class Pairs(PairDataModule):
    def configure_datasets(self) -> tuple[Volumes, Volumes]:
        return Volumes(), Volumes()


def tiny(**options: Any) -> DeepCluster:
    torch.manual_seed(0)
    defaults = {"backbone_options": {"channels": [8, 16]}, "clusters": 2, "reassign_steps": 3}
    return DeepCluster(**{**defaults, **options})


class Watch(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, int], torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append((pl_module.assignments, pl_module.cluster_weights.clone()))


def fit(task: DeepCluster, data: Any, steps: int = 7) -> Watch:
    watch = Watch()
    pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=steps,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        limit_val_batches=0,
    ).fit(task, data)  # fmt: skip
    return watch


def test_clusters_are_those_of_the_features_and_are_found_anew() -> None:
    data = Pairs(patch_size=(8, 8, 8), batch_size=2)
    task = tiny(components=1)
    watch = fit(task, data)
    assert len({id(assignments) for assignments, _ in watch.seen}) == 3  # steps 0, 3 and 6
    assignments, weights = watch.seen[0]
    assert set(assignments) == {f"volume {index}" for index in range(8)}
    kinds = [assignments[f"volume {index}"] for index in range(8)]
    assert kinds[0] == kinds[1]
    assert set(kinds[2:]) == {1 - kinds[0]}
    # both clusters weigh the same: 2 volumes of weight 2, 6 of weight 2 / 3
    assert float(weights[kinds[0]]) == pytest.approx(2)
    assert float(weights[kinds[2]]) == pytest.approx(2 / 3)


def test_training_volumes_are_cropped_at_the_centre() -> None:
    data = Pairs(patch_size=(8, 8, 8), batch_size=2)
    volumes = data.training_volumes()
    assert len(volumes) == 8
    assert volumes[3]["name"] == "volume 3"
    assert torch.equal(volumes[3]["image"], Volumes()[3]["image"][:, 1:9])


def test_loss_weighs_volumes_by_their_cluster() -> None:
    task = tiny()
    task.assignments = {"a": 0, "b": 1}
    task.cluster_weights = torch.tensor([2.0, 0.5])
    views = task.views_of({"image": torch.rand(2, 1, 8, 8, 8), "name": ["a", "b"]})
    assert views["cluster"].tolist() == [0, 1]
    task.eval()
    logits = task.classifier(task.embed_standardised(views["view"]))
    each = [float(logits[i].logsumexp(0) - logits[i, i]) for i in range(2)]
    loss = float(task.compute_losses(views)["total"])
    assert loss == pytest.approx((2 * each[0] + 0.5 * each[1]) / 2, rel=1e-5)


def test_separate_groups_become_clusters() -> None:
    random = np.random.default_rng(0)
    # one direction varies far more than those that tell the groups apart
    groups = np.repeat(np.eye(3), 20, axis=0) * 5
    wide = random.normal(size=(60, 1)) * 30
    features = np.hstack([groups + 0.1 * random.normal(size=(60, 3)), wide])
    clusters = np.array(assign_clusters(features, 3, 64, seed=0)).reshape(3, 20)
    assert {max(set(row), key=row.tolist().count) for row in clusters} == {0, 1, 2}
    again = assign_clusters(features, 3, 64, seed=0)
    assert again == clusters.flatten().tolist()


def test_too_few_volumes_or_other_data() -> None:
    data = Pairs(patch_size=(8, 8, 8), batch_size=2)
    with pytest.raises(InputError, match=r"^clusters "):
        fit(tiny(clusters=9), data)
    loader = DataLoader([{"image": torch.rand(1, 8, 8, 8), "name": "a"}])
    with pytest.raises(InputError, match=r"DataLoader|NoneType"):
        fit(tiny(), loader)


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"^clusters "):
        tiny(clusters=1)
