import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gvsl_lightning.backbones import Backbone, build_backbone
from gvsl_lightning.errors import InputError
from gvsl_lightning.weights import load_backbone, load_backbone_weights, save_backbone

CHANNELS = (8, 8, 16, 16, 32)
ENTRIES = 72


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


@pytest.fixture
def official_names(reference_root: Path) -> dict[str, tuple[int, ...]]:
    """Entry names and shapes of the released pre-training checkpoint, heads included."""
    shapes = {}
    for line in (reference_root / "official_checkpoint_keys.txt").read_text().splitlines():
        if line.startswith("# entries"):
            break
        if not line.startswith("#") and line:
            name, rest = line.split(" ", 1)
            numbers = rest[rest.index("(") + 1 : rest.index(")")].split(",")
            shapes[name] = tuple(int(number) for number in numbers if number.strip())
    return shapes


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
        assert card["versions"]["torch"] == torch.__version__
        assert card["date"].startswith("20")

    def test_any_memory_layout_is_saved(self, tmp_path):
        backbone = tiny().to(memory_format=torch.channels_last_3d)
        rebuilt = load_backbone(save_backbone(backbone, tmp_path / "b.safetensors", {}))
        assert_same_weights(rebuilt, backbone)

    def test_name_must_end_in_safetensors(self, tmp_path):
        with pytest.raises(InputError, match=r"backbone\.pt .*end in \.safetensors"):
            save_backbone(tiny(), tmp_path / "backbone.pt", {})

    def test_missing_card(self, tmp_path):
        path = save_backbone(tiny(), tmp_path / "backbone.safetensors", {})
        path.with_suffix(".json").unlink()
        with pytest.raises(InputError, match=r"backbone\.json does not exist"):
            load_backbone(path)

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
        with pytest.raises(InputError, match=r"backbone\.json does not describe a backbone"):
            load_backbone(path)

    def test_card_of_another_backbone(self, tmp_path):
        path = save_backbone(tiny(), tmp_path / "a.safetensors", {})
        other = save_backbone(tiny(in_channels=2), tmp_path / "b.safetensors", {})
        other.with_suffix(".json").replace(path.with_suffix(".json"))
        with pytest.raises(InputError, match=r"a\.json describes another backbone"):
            load_backbone(path)


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

    def test_released_checkpoint_fills_the_papers_unet(self, official_names, tmp_path):
        # views of one number: the names and shapes matter, not 130 MB of weights
        entries = {name: torch.tensor(0.5).expand(shape) for name, shape in official_names.items()}
        assert len(entries) == 104
        path = tmp_path / "GVSL.pth"
        torch.save(entries, path)
        with torch.device("meta"):
            backbone = build_backbone("unet")
        backbone.to_empty(device="cpu")
        report = load_backbone_weights(backbone, path)
        assert len(report.matched) == ENTRIES
        assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})
        assert all(bool((value == 0.5).all()) for value in backbone.state_dict().values())

    def test_report_counts_what_does_not_fit(self, tmp_path):
        source, target = tiny(in_channels=2), tiny()
        first_weight = "encoder.0.0.conv.weight"
        before = target.state_dict()[first_weight].clone()
        entries = dict(source.state_dict())
        del entries["decoder.3.1.norm.bias"], entries["decoder.3.1.norm.weight"]
        entries["decoder.4.0.conv.bias"] = torch.zeros(8)
        path = tmp_path / "backbone.safetensors"
        save_file(entries, path)
        report = load_backbone_weights(target, path)
        assert len(report.matched) == ENTRIES - 3
        assert report.missing == ("decoder.3.1.norm.weight", "decoder.3.1.norm.bias")
        assert report.unexpected == ("decoder.4.0.conv.bias",)
        assert report.mismatched == {first_weight: ((8, 2, 3, 3, 3), (8, 1, 3, 3, 3))}
        assert report.matched_fraction == pytest.approx(69 / 72)
        line = str(report)
        assert "69 of 72 backbone entries loaded; 2 missing (decoder.3.1.norm.weight" in line
        assert "1 of another shape (encoder.0.0.conv.weight is 8x2x3x3x3, not 8x1x3x3x3)" in line
        assert "\n" not in line
        loaded = target.state_dict()
        assert torch.equal(loaded[first_weight], before)
        assert all(torch.equal(loaded[name], entries[name]) for name in report.matched)

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
        with pytest.raises(InputError, match=r"part\.pth: 64 of 72 .* 8 missing .* unet backbone"):
            load_backbone_weights(target, path)
        assert all(torch.equal(target.state_dict()[name], untouched[name]) for name in untouched)

    def test_backbone_of_another_width_is_refused(self, tmp_path):
        path = save_backbone(tiny(), tmp_path / "narrow.safetensors", {})
        with pytest.raises(InputError, match=r"narrow\.safetensors: 0 of 72 .* of another shape"):
            load_backbone_weights(tiny(channels=(16, 16, 32, 32, 64)), path)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


class TestBadFiles:
    @pytest.mark.parametrize("kind", ["checkpoint", "legacy", "plain pickle"])
    def test_pickled_code_is_not_run(self, tmp_path, kind):
        marker, path = tmp_path / "code was run", tmp_path / "bomb.ckpt"
        content = {"state_dict": tiny().state_dict(), "extra": Bomb(marker)}
        if kind == "plain pickle":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "checkpoint")
        with pytest.raises(InputError, match=r"bomb\.ckpt .*pickled Python objects"):
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
        with pytest.raises(InputError, match=rf"{name} .*corrupted"):
            load_backbone_weights(tiny(), path)

    @pytest.mark.parametrize("content", [torch.zeros(3), [], {"state_dict": [1]}, {"epoch": 1}])
    def test_file_without_weights(self, tmp_path, content):
        path = tmp_path / "other.pth"
        torch.save(content, path)
        with pytest.raises(InputError, match=r"other\.pth: 0 of 72"):
            load_backbone_weights(tiny(), path)

    @pytest.mark.parametrize("name", ["nowhere.ckpt", "."])
    def test_no_file(self, tmp_path, name):
        with pytest.raises(InputError, match="does not exist or is no file"):
            load_backbone_weights(tiny(), tmp_path / name)
