import pytest
import torch

from gvsl_lightning.datamodules.phantom import Phantom, PhantomDataset
from gvsl_lightning.errors import InputError
from gvsl_lightning.phantom import generate_phantom


def test_dataset_items():
    dataset = PhantomDataset("chest_ct", 3, (24, 16, 20), seed=4, start=7)
    assert len(dataset) == 3
    items = [dataset[index] for index in range(len(dataset))]
    assert [item["name"] for item in items] == [f"chest_ct-{n:05d}" for n in (7, 8, 9)]
    for number, item in zip((7, 8, 9), items, strict=True):
        expected = generate_phantom("chest_ct", number, (24, 16, 20), seed=4)
        assert item["image"].shape == item["label"].shape == (1, 24, 16, 20)
        assert torch.equal(item["image"][0], torch.from_numpy(expected["image"]))
        assert torch.equal(item["label"][0], torch.from_numpy(expected["label"]))
        assert item["class"] == expected["class"]
    with pytest.raises(IndexError):
        dataset[3]


def test_workers_generate_the_same_as_the_main_process():
    dataset = PhantomDataset("brain_mr", 4, (16, 16, 16))
    here = torch.cat([dataset[i]["image"] for i in range(4)])
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2)
    assert torch.equal(torch.cat([batch["image"] for batch in loader])[:, 0], here)


def test_data_module_keeps_validation_subjects_apart():
    module = Phantom("cardiac_ct", (16, 16, 16), num_train=4, num_val=3, batch_size=2, val_pairs=6)
    training, validation = module.configure_datasets()
    names = [
        {dataset[i]["name"] for i in range(len(dataset))} for dataset in (training, validation)
    ]
    assert [len(group) for group in names] == [4, 3]
    assert not names[0] & names[1]
    larger = Phantom("cardiac_ct", (16, 16, 16), num_train=40, num_val=3)
    assert torch.equal(larger.configure_datasets()[1][2]["image"], validation[2]["image"])

    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["fixed"].shape == (2, 1, 16, 16, 16)
    check = next(iter(module.val_dataloader()))
    assert check["fixed_label"].shape == (2, 1, 16, 16, 16)
    assert not torch.equal(check["fixed"], check["moving"])


def test_data_module_crops_when_asked():
    module = Phantom("brain_mr", (32, 24, 24), 2, 2, patch_size=(16, 16, 16), batch_size=1)
    module.setup("fit")
    assert next(iter(module.train_dataloader()))["moving"].shape == (1, 1, 16, 16, 16)


def test_command_line_reads_all_options():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(Phantom, "data")
    config = parser.parse_args(
        ["--data=Phantom", "--data.scene=brain_mr", "--data.size=[16,20,24]", "--data.batch_size=3"]
    )
    module = parser.instantiate_classes(config).data
    assert module.patch_size == (16, 20, 24)
    assert module.batch_size == 3


def test_bad_scene_is_noticed_when_the_module_is_made():
    with pytest.raises(InputError, match="heart"):
        Phantom("heart")
