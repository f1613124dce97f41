import json
import os
import pickle
import platform
import re
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import SwinUNETR
from safetensors.torch import load_file, save_file

import gvsl_lightning
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.weights import (
    WeightReport,
    load_backbone,
    load_backbone_weights,
    local_file,
    read_head,
    require_entries,
    save_backbone,
)

CHANNELS = (8, 8, 16, 16, 32)
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": (8, 16)},
    "basic_unet": {"features": (8, 8, 8, 8, 16, 8)},
    "dynunet": {"filters": (8, 16, 16)},
    "segresnet": {"init_filters": 8, "blocks_down": (1, 1)},
    "swin_unetr": {"feature_size": 12},
}
ENTRIES = 72
FIRST_WEIGHT = "encoder.0.0.conv.weight"


def tiny(in_channels: int = 1, channels: tuple[int, ...] = CHANNELS) -> Backbone:
    return build_backbone("unet", in_channels=in_channels, channels=channels)


def assert_same_weights(backbone: Backbone, other: Backbone) -> None:
    entries = backbone.state_dict()
    assert entries.keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(entries[name], value), name


@pytest.fixture
def released(reference_root: Path) -> dict[str, object]:
    return torch.load(reference_root / "official_unet_tiny.pt", weights_only=True)


def released_names(reference_root: Path, section: int) -> dict[str, tuple[int, ...]]:
    """Entry names and shapes of the released checkpoints: 0 pre-training, 1 fine-tuned segmenter.

    The second one lacks those of the first, which it repeats under ``unet_pre.``.
    """
    shapes = {}
    sections = (reference_root / "official_checkpoint_keys.txt").read_text().split("# entries")
    for line in sections[section].splitlines()[1:]:
        if not line.startswith("#") and line:
            name, rest = line.split(" ", 1)
            numbers = rest[rest.index("(") + 1 : rest.index(")")].split(",")
            shapes[name] = tuple(int(number) for number in numbers if number.strip())
    return shapes


@pytest.fixture
def official_names(reference_root: Path) -> dict[str, tuple[int, ...]]:
    return released_names(reference_root, 0)


@pytest.fixture
def segmenter_names(reference_root: Path) -> dict[str, tuple[int, ...]]:
    own = released_names(reference_root, 1)
    return {f"unet_pre.{n}": s for n, s in released_names(reference_root, 0).items()} | own


def constant_entries(names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Views of one number each: the names and shapes matter, not 130 MB of weights."""
    return {name: torch.tensor(0.5).expand(shape) for name, shape in names.items()}


class TestSavedBackbone:
    def test_is_rebuilt_bit_for_bit(self, tmp_path):
        backbone = tiny(in_channels=2)
        path = save_backbone(backbone, tmp_path / "run" / "backbone.safetensors", {})
        rebuilt = load_backbone(path)
        assert_same_weights(rebuilt, backbone)
        volume = torch.randn(1, 2, 19, 16, 21)
        with torch.no_grad():
            expected, got = backbone.eval()(volume), rebuilt.eval()(volume)
        assert torch.equal(got.global_features, expected.global_features)
        assert torch.equal(got.local_features, expected.local_features)

    def test_card_says_what_was_trained(self, tmp_path):
        path = save_backbone(
            tiny(),
            tmp_path / "backbone.safetensors",
            {"data": {"root": Path("volumes")}, "steps": 7, "backbone": "overwritten"},
        )
        card = json.loads(path.with_suffix(".json").read_text())
        assert card["backbone"]["name"] == "unet"
        assert card["backbone"]["in_channels"] == 1
        assert tuple(card["backbone"]["options"]["channels"]) == CHANNELS
        assert card["parameters"] == sum(p.numel() for p in tiny().parameters())
        assert (card["data"], card["steps"]) == ({"root": "volumes"}, 7)
        packages = ("torch", "monai", "pytorch-lightning")
        versions = {name: metadata.version(name) for name in packages}
        own = {"gvsl-lightning": gvsl_lightning.__version__, "python": platform.python_version()}
        assert card["versions"] == versions | own
        assert datetime.fromisoformat(card["date"]).utcoffset() == timedelta(0)

    def test_head_is_kept_beside_the_backbone(self, tmp_path):
        backbone, head, path = tiny(), torch.nn.Linear(3, 2), tmp_path / "b.safetensors"
        assert set(load_file(save_backbone(backbone, path, {}))) == set(backbone.state_dict())
        assert read_head(path, "head") == {}
        save_backbone(backbone, path, {}, head)
        entries = read_head(path, "head")
        assert entries.keys() == head.state_dict().keys()
        assert all(torch.equal(entries[name], value) for name, value in head.state_dict().items())
        assert_same_weights(load_backbone(path), backbone)

    def test_any_memory_layout_is_saved(self, tmp_path):
        backbone = tiny().to(memory_format=torch.channels_last_3d)
        rebuilt = load_backbone(save_backbone(backbone, tmp_path / "b.safetensors", {}))
        assert_same_weights(rebuilt, backbone)

    def test_its_folder_stands_for_it(self, tmp_path):
        path = save_backbone(tiny(), tmp_path / "run" / "backbone.safetensors", {})
        assert local_file(tmp_path / "run") == local_file(str(path)) == path
        assert_same_weights(load_backbone(tmp_path / "run"), load_backbone(path))

    def test_name_must_end_in_safetensors(self, tmp_path):
        with pytest.raises(InputError, match=r"backbone\.pt "):
            save_backbone(tiny(), tmp_path / "backbone.pt", {})

    def test_missing_card(self, tmp_path):
        path = save_backbone(tiny(), tmp_path / "backbone.safetensors", {})
        path.with_suffix(".json").unlink()
        with pytest.raises(InputError, match=r"backbone\.json"):
            load_backbone(path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_not_written(self, tmp_path, value):
        backbone = tiny()
        with torch.no_grad():
            backbone.get_parameter("encoder.0.0.norm.bias")[3] = value
        with pytest.raises(InputError, match=r"encoder\.0\.0\.norm\.bias.*b\.safetensors"):
            save_backbone(backbone, tmp_path / "b.safetensors", {})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            "{}",
            '{"backbone": {"name": "unet"}}',
            '{"backbone": {"name": "no such", "in_channels": 1, "options": {}}}',
            '{"backbone": {"name": "unet", "in_channels": 1, "options": {"no_such": 1}}}',
        ],
    )
    def test_broken_card(self, tmp_path, text):
        path = save_backbone(tiny(), tmp_path / "backbone.safetensors", {})
        path.with_suffix(".json").write_text(text)
        with pytest.raises(InputError, match=r"backbone\.json"):
            load_backbone(path)

    def test_card_of_another_backbone(self, tmp_path):
        path = save_backbone(tiny(), tmp_path / "a.safetensors", {})
        other = save_backbone(tiny(in_channels=2), tmp_path / "b.safetensors", {})
        other.with_suffix(".json").replace(path.with_suffix(".json"))
        with pytest.raises(InputError, match=r"a\.json"):
            load_backbone(path)

    @pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape"])
    def test_every_entry_must_fit_the_card(self, tmp_path, change):
        path = save_backbone(tiny(), tmp_path / "a.safetensors", {})
        entries = tiny().state_dict()
        first = entries.pop(FIRST_WEIGHT)
        if change == "unexpected":
            entries |= {FIRST_WEIGHT: first, "encoder.5.0.conv.bias": torch.zeros(8)}
        elif change == "of another shape":
            entries[FIRST_WEIGHT] = torch.tensor(1.0)
        save_file(entries, path)
        with pytest.raises(InputError, match=rf"; 1 {change}.*a\.json") as caught:
            load_backbone(path)
        assert ("is a scalar, not 8x1x3x3x3" in str(caught.value)) == (change == "of another shape")


class TestLoadBackboneWeights:
    def test_lightning_checkpoint(self, tmp_path):
        source, target = tiny(), tiny()
        entries = {f"backbone.{name}": value for name, value in source.state_dict().items()}
        entries["restoration_head.weight"] = torch.zeros(3)
        path = tmp_path / "last.ckpt"
        torch.save({"state_dict": entries, "epoch": 3, "hyper_parameters": {"rate": 0.1}}, path)
        report = load_backbone_weights(target, path)
        assert_same_weights(target, source)
        assert len(report.matched) == ENTRIES
        assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})
        assert str(report) == f"{path}: 72 of 72 backbone entries loaded"

    @pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone.", "_orig_mod."])
    def test_wrappers_prefixes(self, tmp_path, prefix):
        source, target = tiny(), tiny()
        path = tmp_path / "weights.pth"
        torch.save({prefix + name: value for name, value in source.state_dict().items()}, path)
        assert load_backbone_weights(target, path).matched_fraction == 1
        assert_same_weights(target, source)

    def test_what_is_no_tensor_is_passed_over(self, tmp_path):
        source, target = tiny(), tiny()
        path = tmp_path / "weights.pth"
        torch.save({**source.state_dict(), "note": "a text", 7: torch.zeros(3)}, path)
        report = load_backbone_weights(target, path)
        assert (report.matched_fraction, report.unexpected) == (1, ())

    def test_values_must_be_finite(self, tmp_path):
        entries = tiny().state_dict()
        entries[FIRST_WEIGHT][0] = float("nan")
        torch.save(entries, tmp_path / "w.pth")
        with pytest.raises(InputError, match=rf"w\.pth.* {FIRST_WEIGHT}"):
            load_backbone_weights(tiny(), tmp_path / "w.pth")

    @pytest.mark.parametrize("prefix", ["", "unet.", "module.unet.", "unet_pre.unet."])
    def test_released_unet_gives_the_released_features(self, released, tmp_path, prefix):
        path = tmp_path / "released.pth"
        torch.save({prefix + name: v for name, v in released["state_dict"].items()}, path)
        backbone = tiny().eval()
        report = load_backbone_weights(backbone, path)
        assert (len(report.matched), report.missing, report.unexpected) == (ENTRIES, (), ())
        for suffix in ("", "_odd"):
            with torch.no_grad():
                features = backbone(released["x" + suffix])
            for got, name in (
                (features.global_features, "f_global"),
                (features.local_features, "f_local"),
            ):
                torch.testing.assert_close(got, released[name + suffix], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("wrapper", ["", "module."])
    @pytest.mark.parametrize(
        ("checkpoint", "entries"), [("official_names", 104), ("segmenter_names", 178)]
    )
    def test_released_checkpoint_fills_the_papers_unet(
        self, request, tmp_path, checkpoint, entries, wrapper
    ):
        content = constant_entries(request.getfixturevalue(checkpoint))
        assert len(content) == entries
        path = tmp_path / "GVSL_epoch_1000.pth"
        # the released code saves in both formats
        torch.save(
            {wrapper + name: value for name, value in content.items()},
            path,
            _use_new_zipfile_serialization=checkpoint == "official_names",
        )
        with torch.device("meta"):
            backbone = build_backbone("unet")
        backbone.to_empty(device="cpu")
        report = load_backbone_weights(backbone, path)
        assert len(report.matched) == ENTRIES
        assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})
        assert report.adapted == {}
        assert all(bool((value == 0.5).all()) for value in backbone.state_dict().values())

    def test_report_counts_what_does_not_fit(self, tmp_path):
        source, target = tiny(in_channels=2), tiny()
        second_weight = "encoder.0.1.conv.weight"
        before = target.state_dict()[second_weight].clone()
        entries = dict(source.state_dict())
        del entries["decoder.3.1.norm.bias"], entries["decoder.3.1.norm.weight"]
        entries["decoder.4.0.conv.bias"] = torch.zeros(8)
        entries[second_weight] = torch.zeros(8, 8, 1, 1, 1)
        path = tmp_path / "backbone.safetensors"
        save_file(entries, path)
        report = load_backbone_weights(target, path)
        assert len(report.matched) == ENTRIES - 3
        assert report.missing == ("decoder.3.1.norm.weight", "decoder.3.1.norm.bias")
        assert report.unexpected == ("decoder.4.0.conv.bias",)
        assert report.mismatched == {second_weight: ((8, 8, 1, 1, 1), (8, 8, 3, 3, 3))}
        assert report.adapted == {FIRST_WEIGHT: ((8, 2, 3, 3, 3), (8, 1, 3, 3, 3))}
        assert report.matched_fraction == pytest.approx(69 / 72)
        assert str(report) == (
            f"{path}: 69 of 72 backbone entries loaded; "
            "1 adapted to the number of input channels (encoder.0.0.conv.weight from 2 to 1); "
            "2 missing (decoder.3.1.norm.weight, decoder.3.1.norm.bias); "
            "1 of another shape (encoder.0.1.conv.weight is 8x8x1x1x1, not 8x8x3x3x3); "
            "1 unexpected (decoder.4.0.conv.bias)"
        )
        loaded = target.state_dict()
        assert torch.equal(loaded[second_weight], before)
        unchanged = set(report.matched) - {FIRST_WEIGHT}
        assert all(torch.equal(loaded[name], entries[name]) for name in unchanged)

    @pytest.mark.parametrize(
        ("count", "names"), [(1, "a"), (2, "a, b"), (3, "a, b and 1 more"), (5, "a, b and 3 more")]
    )
    def test_report_names_two_entries(self, count, names):
        report = WeightReport(Path("w.ckpt"), missing=tuple("abcde"[:count]))
        assert str(report) == (
            f"w.ckpt: 0 of {count} backbone entries loaded; {count} missing ({names})"
        )

    def test_half_precision_file_is_read_in_float32(self, tmp_path):
        source, target = tiny(), tiny()
        path = tmp_path / "half.pth"
        torch.save({name: value.half() for name, value in source.state_dict().items()}, path)
        load_backbone_weights(target, path)
        for name, value in target.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, source.state_dict()[name].half().float())

    @pytest.mark.parametrize(("removed", "accepted"), [(7, True), (8, False)])
    def test_limit_is_ninety_percent(self, tmp_path, removed, accepted):
        source, target = tiny(), tiny()
        untouched = {name: value.clone() for name, value in target.state_dict().items()}
        path = tmp_path / "part.pth"
        torch.save(dict(list(source.state_dict().items())[removed:]), path)
        if accepted:
            assert len(load_backbone_weights(target, path).missing) == removed
            return
        with pytest.raises(InputError, match=r"part\.pth: 64 of 72"):
            load_backbone_weights(target, path)
        assert all(torch.equal(target.state_dict()[name], untouched[name]) for name in untouched)

    def test_ninety_percent_are_enough(self, tmp_path):
        channels = (8, 8, 8)
        entries = list(tiny(channels=channels).state_dict().items())
        torch.save(dict(entries[4:]), tmp_path / "part.pth")
        report = load_backbone_weights(tiny(channels=channels), tmp_path / "part.pth")
        assert (len(report.matched), len(entries)) == (36, 40)
        torch.save(dict(entries[5:]), tmp_path / "part.pth")
        with pytest.raises(InputError, match=r"part\.pth: 35 of 40"):
            load_backbone_weights(tiny(channels=channels), tmp_path / "part.pth")

    def test_backbone_of_another_width_is_refused(self, tmp_path):
        path = save_backbone(tiny(), tmp_path / "narrow.safetensors", {})
        with pytest.raises(InputError, match=r"narrow\.safetensors: 0 of 72"):
            load_backbone_weights(tiny(channels=(16, 16, 32, 32, 64)), path)


class TestEncoderOnly:
    @pytest.mark.parametrize(("name", "options"), SMALL.items())
    def test_global_features_are_the_files_and_the_decoder_stays(self, tmp_path, name, options):
        source, backbone = build_backbone(name, **options), build_backbone(name, **options)
        path = save_backbone(source, tmp_path / "b.safetensors", {})
        decoder = {
            entry: value.clone()
            for entry, value in backbone.state_dict().items()
            if entry.split(".")[0] in backbone.decoder_parts
        }
        report = load_backbone_weights(backbone, path, encoder_only=True)
        assert report.matched_fraction == 1
        assert len(report.matched) == len(source.state_dict()) - len(decoder)
        assert f"{len(report.matched)} of {len(report.matched)} encoder entries" in str(report)
        assert not report.unexpected
        volume = torch.rand(1, 1, 32, 32, 32)
        with torch.no_grad():
            expected, got = source.eval().encode(volume), backbone.eval().encode(volume)
        assert torch.equal(got, expected)
        assert decoder
        assert all(
            torch.equal(backbone.state_dict()[entry], value) for entry, value in decoder.items()
        )

    def test_a_file_without_a_decoder_will_do(self, tmp_path):
        source = tiny().state_dict()
        encoder = {name: value for name, value in source.items() if name.startswith("encoder")}
        save_file(encoder, tmp_path / "encoder.safetensors")
        with pytest.raises(InputError, match="missing"):
            load_backbone_weights(tiny(), tmp_path / "encoder.safetensors")
        report = load_backbone_weights(tiny(), tmp_path / "encoder.safetensors", encoder_only=True)
        assert set(report.matched) == set(encoder)


class TestMonaiSwinUnetr:
    OPTIONS: ClassVar = {"feature_size": 12, "norm_name": "instance"}

    def network(self) -> SwinUNETR:
        torch.manual_seed(1)
        return SwinUNETR(1, 2, feature_size=12)

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_a_whole_network(self, tmp_path, prefix):
        network = self.network()
        entries = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
        torch.save({"state_dict": entries}, tmp_path / "model.pt")
        backbone = build_backbone("swin_unetr", **self.OPTIONS)
        report = load_backbone_weights(backbone, tmp_path / "model.pt")
        assert (report.matched_fraction, len(report.missing)) == (1, 0)
        volume = torch.rand(1, 1, 64, 32, 32)
        with torch.no_grad():
            expected = network.eval()(volume)
            local = backbone.eval()(volume).local_features
            torch.testing.assert_close(network.out(local), expected)

    def test_a_transformer_alone(self, tmp_path):
        network = self.network()
        entries = {
            f"module.{name}".replace("linear", "fc"): value
            for name, value in network.swinViT.state_dict().items()
        }
        torch.save({"state_dict": entries}, tmp_path / "model.pt")
        backbone = build_backbone("swin_unetr", **self.OPTIONS)
        load_backbone_weights(backbone, tmp_path / "model.pt", encoder_only=True)
        for name, value in network.swinViT.state_dict().items():
            assert torch.equal(backbone.state_dict()[f"transformer.{name}"], value)


class TestOtherInputChannels:
    @pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
    @pytest.mark.parametrize(
        ("name", "options", "readers"),
        [
            ("unet", {}, [FIRST_WEIGHT]),
            ("basic_unet", {}, ["encoder.0.conv_0.conv.weight"]),
            ("dynunet", {}, ["encoder.0.conv1.conv.weight"]),
            (
                "dynunet",
                {"res_block": True},
                ["encoder.0.conv1.conv.weight", "encoder.0.conv3.conv.weight"],
            ),
            ("segresnet", {}, ["stem.conv.weight"]),
            (
                "swin_unetr",
                {},
                [
                    "transformer.patch_embed.proj.weight",
                    "skip_encoders.0.layer.conv1.conv.weight",
                    "skip_encoders.0.layer.conv3.conv.weight",
                ],
            ),
        ],
    )
    def test_a_repeated_volume_keeps_its_features(
        self, tmp_path, name, options, readers, before, after
    ):
        options = {**SMALL[name], **options}
        source = build_backbone(name, before, **options).eval()
        target = build_backbone(name, after, **options).eval()
        path = save_backbone(source, tmp_path / "backbone.safetensors", {})
        report = load_backbone_weights(target, path)
        assert list(report.adapted) == readers
        assert set(report.matched) == source.state_dict().keys()
        assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})
        assert f"{readers[0]} from {before} to {after}" in str(report)
        volume = torch.rand(1, 1, 16, 16, 16)
        with torch.no_grad():
            expected = source(volume.expand(-1, before, -1, -1, -1))
            got = target(volume.expand(-1, after, -1, -1, -1))
        for found, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("before", "after", "spread"),
        [
            (1, 2, lambda a: [a / 2, a / 2]),
            (2, 1, lambda a, b: [a + b]),
            (2, 3, lambda a, b: [a / 2, b, a / 2]),
            (3, 2, lambda a, b, c: [a + c, b]),
        ],
    )
    def test_channels_are_shared_in_turn(
        self, tmp_path, before: int, after: int, spread: Callable[..., list[torch.Tensor]]
    ):
        source, target = tiny(before), tiny(after)
        path = save_backbone(source, tmp_path / "backbone.safetensors", {})
        load_backbone_weights(target, path)
        given = source.state_dict()[FIRST_WEIGHT].unbind(1)
        torch.testing.assert_close(
            target.state_dict()[FIRST_WEIGHT], torch.stack(spread(*given), dim=1)
        )

    def test_another_kernel_is_not_adapted(self, tmp_path):
        entries = tiny(1).state_dict()
        entries[FIRST_WEIGHT] = torch.zeros(8, 1, 5, 5, 5)
        save_file(entries, tmp_path / "backbone.safetensors")
        report = load_backbone_weights(tiny(2), tmp_path / "backbone.safetensors")
        assert report.adapted == {}
        assert list(report.mismatched) == [FIRST_WEIGHT]

    def test_layers_that_disagree_are_left_alone(self, tmp_path):
        options = {"filters": (8, 16, 16), "res_block": True}
        entries = build_backbone("dynunet", 1, **options).state_dict()
        entries["encoder.0.conv1.conv.weight"] = torch.zeros(8, 2, 3, 3, 3)
        entries["encoder.0.conv3.conv.weight"] = torch.zeros(8, 4, 1, 1, 1)
        save_file(entries, tmp_path / "backbone.safetensors")
        report = load_backbone_weights(
            build_backbone("dynunet", 1, **options), tmp_path / "backbone.safetensors"
        )
        assert report.adapted == {}
        assert len(report.mismatched) == 2


class TestRequireEntries:
    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"weight": None}, "1 of 2 model entries loaded; 1 missing (weight)"),
            ({"scale": torch.ones(2)}, "2 of 2 model entries loaded; 1 unexpected (scale)"),
            (
                {"bias": torch.ones(())},
                "1 of 2 model entries loaded; 1 of another shape (bias is a scalar, not 2)",
            ),
        ],
        ids=["missing", "unexpected", "of another shape"],
    )
    def test_checkpoint_of_another_model(self, tmp_path, change, found):
        module, path = torch.nn.Linear(3, 2), tmp_path / "last.ckpt"
        entries = {**module.state_dict(), **change}
        torch.save(
            {"state_dict": {name: value for name, value in entries.items() if value is not None}},
            path,
        )
        with pytest.raises(InputError, match=re.escape(f"{path}: {found}")):
            require_entries(path, module)

    @pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
    def test_values_must_be_finite(self, tmp_path, value):
        module, path = torch.nn.Linear(3, 2), tmp_path / "last.ckpt"
        torch.save({"state_dict": {**module.state_dict(), "bias": torch.tensor([0, value])}}, path)
        if value == 1:
            require_entries(path, module)
            return
        with pytest.raises(InputError, match=r"last\.ckpt.* bias"):
            require_entries(path, module)


class TestReadHead:
    def test_released_segmenter_predicts_as_before(self, released, tmp_path):
        unet = {f"unet.{name}": value for name, value in released["state_dict"].items()}
        head = {"out_conv.weight": torch.randn(3, 8, 3, 3, 3), "out_conv.bias": torch.randn(3)}
        path = tmp_path / "WHS_CT_Seg_GVSL_Finetune_epoch_val_dice_best.pth"
        torch.save({f"unet_pre.{name}": value for name, value in unet.items()} | unet | head, path)
        backbone, convolution = tiny().eval(), torch.nn.Conv3d(8, 3, 3, padding=1)
        report = load_backbone_weights(backbone, path)
        assert (len(report.matched), report.unexpected) == (ENTRIES, ())
        convolution.load_state_dict(read_head(path))
        with torch.no_grad():
            got = convolution(backbone(released["x_odd"]).local_features)
        expected = F.conv3d(released["f_local_odd"], *head.values(), padding=1)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.softmax(1), expected.softmax(1), rtol=0, atol=1e-5)

    def test_released_shapes(self, segmenter_names, tmp_path):
        torch.save(constant_entries(segmenter_names), tmp_path / "finetuned.pth")
        shapes = {
            name: value.shape for name, value in read_head(tmp_path / "finetuned.pth").items()
        }
        assert shapes == {"weight": (8, 32, 3, 3, 3), "bias": (8,)}

    def test_by_name_and_from_a_wrapper(self, tmp_path):
        entries = {"module.head.weight": torch.ones(2), "module.head2.bias": torch.ones(1)}
        torch.save({"state_dict": entries}, tmp_path / "last.ckpt")
        assert list(read_head(tmp_path / "last.ckpt", "head")) == ["weight"]

    def test_none_in_the_file(self, official_names, tmp_path):
        torch.save(constant_entries(official_names), tmp_path / "GVSL_epoch_1000.pth")
        assert read_head(tmp_path / "GVSL_epoch_1000.pth") == {}


class TestHuggingFace:
    @pytest.mark.parametrize("repository", ["lab-1/gvsl_ct.v2", "hf:lab-1/gvsl_ct.v2"])
    def test_repository(self, hub, repository):
        source, target = tiny(), tiny()
        save_backbone(source, hub / "lab-1" / "gvsl_ct.v2" / "backbone.safetensors", {})
        report = load_backbone_weights(target, repository)
        assert report.matched_fraction == 1
        assert_same_weights(target, source)
        assert_same_weights(load_backbone(repository), source)
        assert read_head(repository) == {}

    def test_a_path_comes_first(self, hub):
        save_backbone(tiny(), hub / "owner" / "name" / "backbone.safetensors", {})
        source, target = tiny(), tiny()
        Path("owner").mkdir()
        torch.save(source.state_dict(), "owner/name")
        load_backbone_weights(target, "owner/name")
        assert_same_weights(target, source)
        assert load_backbone_weights(target, "hf:owner/name").matched_fraction == 1
        assert_same_weights(target, load_backbone("hf:owner/name"))

    @pytest.mark.parametrize("lacking", ["backbone.safetensors", "backbone.json"])
    def test_repository_that_cannot_be_read(self, hub, lacking):
        save_backbone(tiny(), hub / "owner" / "name" / "backbone.safetensors", {})
        (hub / "owner" / "name" / lacking).unlink()
        with pytest.raises(InputError, match=r"^owner/name .*ConnectionError") as caught:
            load_backbone_weights(tiny(), "owner/name")
        assert "\n" not in str(caught.value)

    def test_without_the_package(self, hub, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(InputError, match=r"^owner/name .*gvsl-lightning\[hub\]"):
            load_backbone_weights(tiny(), "owner/name")

    @pytest.mark.parametrize("path", ["runs/last.ckpt", "runs/version_0/backbone", "/tmp/nowhere"])
    def test_a_mistyped_path_is_no_repository(self, hub, monkeypatch, path):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(InputError, match=f"^{path} "):
            load_backbone_weights(tiny(), path)

    def test_the_package_reads_its_cache_without_a_network(self, tmp_path, monkeypatch):
        pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        commit, source, target = "a" * 40, tiny(), tiny()
        with pytest.raises(InputError, match="owner/name"):
            load_backbone_weights(target, "owner/name")
        cached = tmp_path / "models--owner--name"
        save_backbone(source, cached / "snapshots" / commit / "backbone.safetensors", {})
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
        load_backbone_weights(target, "owner/name")
        assert_same_weights(target, source)


class TestArtifact:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Content of the only artifact of Weights & Biases."""

        class Api:
            def artifact(self, name: str) -> Any:
                if name != "me/project/name:best":
                    raise ConnectionError("not found\nin no project")
                return self

            def download(self) -> str:
                return str(tmp_path)

        module: Any = ModuleType("wandb")
        module.Api = Api
        monkeypatch.setitem(sys.modules, "wandb", module)
        return tmp_path

    def test_backbone_comes_before_checkpoints(self, folder):
        source = tiny()
        torch.save({}, folder / "last.ckpt")
        assert local_file("wandb:me/project/name:best") == folder / "last.ckpt"
        save_backbone(source, folder / "backbone.safetensors", {})
        assert_same_weights(load_backbone("wandb:me/project/name:best"), source)

    def test_wrong_name(self, folder):
        with pytest.raises(InputError, match=r"^wandb:me/x:y .*ConnectionError") as caught:
            local_file("wandb:me/x:y")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("names", [[], ["card.json"], ["a.ckpt", "b.ckpt"]])
    def test_no_checkpoint_in_it_or_several(self, folder, names):
        for name in names:
            (folder / name).touch()
        with pytest.raises(InputError, match=r"^wandb:me/project/name:best "):
            local_file("wandb:me/project/name:best")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


class TestBadFiles:
    @pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".bin"])
    @pytest.mark.parametrize("kind", ["checkpoint", "legacy", "plain pickle"])
    def test_pickled_code_is_not_run(self, tmp_path, kind, suffix):
        marker, path = tmp_path / "code was run", tmp_path / f"bomb{suffix}"
        content = {"state_dict": tiny().state_dict(), "extra": Bomb(marker)}
        if kind == "plain pickle":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "checkpoint")
        for read in (lambda: load_backbone_weights(tiny(), path), lambda: read_head(path)):
            with pytest.raises(InputError, match=f"bomb{suffix}.*pickled"):
                read()
        assert not marker.exists()
        if kind == "plain pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert marker.exists(), "the file is no bomb, so the test shows nothing"

    def test_pickled_code_under_the_name_of_safetensors(self, tmp_path):
        marker, path = tmp_path / "code was run", tmp_path / "backbone.safetensors"
        path.write_bytes(pickle.dumps(Bomb(marker)))
        with pytest.raises(InputError, match=r"backbone\.safetensors .*corrupted.*\(Safetensor"):
            load_backbone_weights(tiny(), path)
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["weights.ckpt", "weights.safetensors"])
    @pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
    def test_corrupted(self, tmp_path, name, damage):
        path = tmp_path / name
        if path.suffix == ".ckpt":
            torch.save(tiny().state_dict(), path)
        else:
            save_file(tiny().state_dict(), path)
        content = {"empty": b"", "truncated": path.read_bytes()[:5000], "text": b"no weights"}
        path.write_bytes(content[damage])
        with pytest.raises(InputError, match=rf"{name} .*(corrupted|damaged)"):
            load_backbone_weights(tiny(), path)

    @pytest.mark.parametrize("content", [torch.zeros(3), [], {"state_dict": [1]}, {"epoch": 1}])
    def test_file_without_weights(self, tmp_path, content):
        path = tmp_path / "other.pth"
        torch.save(content, path)
        with pytest.raises(InputError, match=r"other\.pth: 0 of 72"):
            load_backbone_weights(tiny(), path)

    @pytest.mark.parametrize("name", ["nowhere.ckpt", "."])
    def test_no_file(self, tmp_path, name):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            load_backbone_weights(tiny(), tmp_path / name)
