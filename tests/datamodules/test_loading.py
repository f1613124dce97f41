"""A run that resumes with other batches repeats no item of an epoch and leaves none out."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from gvsl_lightning.datamodules import Phantom, PhantomSegmentation
from gvsl_lightning.tasks import GVSL, Segmentation

SMALL = {"channels": [4, 8]}
CLASSES = ["background", "heart"]


class Seen(pl.Callback):
    """Notes the items in their order."""

    def __init__(self) -> None:
        self.items: list[str] = []
        self.seeds: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.items += batch.get("fixed_name", batch.get("name"))
        self.seeds.append(batch.get("seed", 0))


def fit(kind: str, size: int, folder: Path, **options: Any) -> tuple[pl.Trainer, Seen]:
    if kind == "pairs":
        data: Any = Phantom(size=(16, 16, 16), num_train=6, num_val=0, batch_size=size)
        task: Any = GVSL(backbone_options=SMALL, affine_channels=4)
    else:
        names = ["background", *map(str, range(7))]
        data = PhantomSegmentation(
            size=(16, 16, 16), count=8, val=1, test=1, batch_size=size, class_names=names
        )
        task = Segmentation(names, mode="scratch", backbone_options=SMALL, window_size=(16, 16, 16))
    seen, path = Seen(), options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[seen],
        **options,
    )
    trainer.fit(task, data, ckpt_path=path)
    return trainer, seen


@pytest.mark.parametrize("kind", ["pairs", "cases"])
@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 4}], ids=["whole", "part"])
def test_a_whole_epoch_begins_where_the_batch_size_is_another(
    kind: str, limit: dict[str, int], tmp_path: Path
) -> None:
    trainer, first = fit(kind, 2, tmp_path, **limit)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="batch size"):
        resumed, second = fit(kind, 3, tmp_path, max_steps=8, ckpt_path=tmp_path / "a.ckpt")
    for start in (0, 6):  # Lightning's own count of epochs is another one
        epoch = second.items[start : start + 6]
        assert len(set(epoch)) == len(epoch)
    assert len(set(second.items[:6])) == 6
    if kind == "pairs":
        assert not set(first.seeds) & set(second.seeds)
    resumed.save_checkpoint(tmp_path / "b.ckpt")
    _, third = fit(kind, 3, tmp_path, max_steps=10, ckpt_path=tmp_path / "b.ckpt")
    _, whole = fit(kind, 3, tmp_path, max_steps=10, ckpt_path=tmp_path / "a.ckpt")
    assert whole.seeds[-2:] == third.seeds
    assert whole.items[-6:] == third.items
