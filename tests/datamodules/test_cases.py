from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from monai.transforms import RandGaussianNoised
from torch.utils.data import Dataset, StackDataset

from gvsl_lightning.datamodules.cases import CaseDataModule
from gvsl_lightning.errors import InputError


class Numbers(CaseDataModule):
    """Case number n is a volume of that number; classes alternate in runs of five."""

    class_names = ("low", "high")
    count = 20
    strata = False

    def configure_cases(self) -> list[str]:
        return [f"case_{index:02d}" for index in range(self.count)]

    def configure_dataset(self, indices: Sequence[int], role: str) -> Dataset[dict[str, Any]]:
        images = [torch.full((1, 2, 2, 2), float(index)) for index in indices]
        return StackDataset(image=images, name=[self.configure_cases()[i] for i in indices])

    def configure_augmentation(self) -> list[Any]:
        return [RandGaussianNoised("image", prob=1.0, std=0.1)]

    def configure_strata(self) -> Sequence[Any] | None:
        return [index // 5 for index in range(self.count)] if self.strata else None


def seen(module: CaseDataModule, epoch: int = 0) -> list[torch.Tensor]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [batch["image"] for batch in loader]


class TestLoaders:
    def test_only_the_labelled_cases_train_and_all_of_the_others_are_whole(self):
        module = Numbers(val=4, test=6, labelled=3, batch_size=2, augmentation=False)
        trained = torch.cat(seen(module))[:, 0, 0, 0, 0].tolist()
        assert sorted(trained) == list(module.split.train)
        assert len(trained) == 3
        validated = [batch["image"].flatten()[0].item() for batch in module.val_dataloader()]
        assert validated == list(module.split.val)
        tested = [batch["image"].flatten()[0].item() for batch in module.test_dataloader()]
        assert tested == list(module.split.test)

    def test_strata_are_used(self):
        module = Numbers(val=0, labelled=4)
        module.strata = True
        module.setup()
        assert sorted(index // 5 for index in module.split.train) == [0, 1, 2, 3]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_augmentation_differs_by_epoch_and_not_by_workers(self, workers):
        first, again, later, other = (
            torch.cat(seen(Numbers(val=0.0, num_workers=count, seed=seed), epoch))
            for count, seed, epoch in ((0, 1, 0), (workers, 1, 0), (workers, 1, 1), (workers, 2, 0))
        )
        assert torch.equal(first, again)
        for different in (later, other):
            assert not torch.equal(first.sort(dim=0).values, different.sort(dim=0).values)
        noise = first - first.round()
        assert noise.std() > 0.02

    def test_cached_cases_are_augmented_anew(self):
        module = Numbers(val=0, cache=True)
        first, second = (torch.cat(seen(module, epoch)) for epoch in (0, 1))
        assert not torch.equal(first.sort(dim=0).values, second.sort(dim=0).values)

    def test_own_augmentation_takes_the_place_of_the_default(self):
        spec = {
            "class_path": "monai.transforms.ScaleIntensityRanged",
            "init_args": {"keys": "image", "a_min": 0, "a_max": 1, "b_min": 5, "b_max": 6},
        }
        images = torch.cat(seen(Numbers(val=0, augmentation=[spec])))
        assert sorted(images[:, 0, 0, 0, 0].tolist()) == [index + 5.0 for index in range(20)]

    @pytest.mark.parametrize("processes", [1, 2, 3, 5])
    @pytest.mark.parametrize("role", ["val", "test"])
    def test_processes_share_the_whole_cases_without_repeating_any(self, role, processes):
        names = []
        for rank in range(processes):
            module = Numbers(val=5, test=5)
            module.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
            loader = getattr(module, f"{role}_dataloader")()
            mine = [batch["name"][0] for batch in loader]
            assert len(mine) == len(loader)
            names += mine
        split = Numbers(val=5, test=5)
        split.setup()
        expected = [f"case_{index:02d}" for index in getattr(split.split, role)]
        assert sorted(names) == expected

    def test_more_processes_than_whole_cases(self):
        module = Numbers(val=1, test=5)
        module.trainer = SimpleNamespace(world_size=2, global_rank=0)
        with pytest.raises(InputError, match="val has 1 of the cases and there are 2 processes"):
            module.val_dataloader()

    def test_no_validation_cases_and_no_test_cases(self):
        module = Numbers(val=0)
        assert module.val_dataloader() == []
        with pytest.raises(InputError, match="no test cases; set test"):
            module.test_dataloader()

    def test_nothing_left_for_training(self):
        with pytest.raises(InputError, match="Of 20 cases none is left for training"):
            Numbers(val=10, test=10).setup("fit")

    def test_an_external_test_set_needs_no_training_cases(self):
        module = Numbers(val=0, test=20)
        module.setup("test")
        assert len(module.test_dataloader()) == 20

    def test_check_happens_before_training(self):
        class Checked(Numbers):
            def check_cases(self, indices: Sequence[int]) -> None:
                assert sorted(indices) == sorted([*self.split.train, *self.split.val])
                raise InputError("case_03 is wrong.")

        with pytest.raises(InputError, match="case_03"):
            Checked(val=3, labelled=2).setup("fit")

    @pytest.mark.parametrize(
        "options",
        [
            {"folds": 1},
            {"folds": 3, "fold": 3},
            {"seed": -1},
            {"batch_size": 0},
            {"num_workers": -1},
        ],
    )
    def test_options_out_of_range(self, options):
        with pytest.raises(InputError):
            Numbers(**options)

    def test_a_resumed_run_sees_what_the_unbroken_one_saw(self, tmp_path: Path):
        class Recorder(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)
                self.batches: list[torch.Tensor] = []

            def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
                self.batches.append(batch["image"])
                return self.layer(torch.ones(1, 1)).sum()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), 0.1)

        def run(steps: int, resumed: str | None = None) -> list[torch.Tensor]:
            task = Recorder()
            trainer = pl.Trainer(
                max_steps=steps,
                logger=False,
                accelerator="cpu",
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(task, Numbers(val=0, batch_size=3), ckpt_path=resumed)
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            return task.batches

        whole = run(12)
        first = run(9)
        second = run(12, str(tmp_path / "last.ckpt"))
        assert len(first) + len(second) == len(whole) == 12
        for got, expected in zip([*first, *second], whole, strict=True):
            assert torch.equal(got, expected)
