"""A thousand steps in mixed precision on a GPU, of generated and of real volumes, stay finite."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gvsl_lightning.cli.main import main
from gvsl_lightning.runs.files import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 1000


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["quickstart", "pretrain/hippocampus"])
def test_a_thousand_steps_stay_finite(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest, name: str,
    precision: str,
) -> None:  # fmt: skip
    words = ["fit", f"--config={CONFIGS}/{name}.yaml", f"--trainer.precision={precision}"]
    if name == "pretrain/hippocampus":
        words.append(f"--data.root={request.getfixturevalue('data_root')}")
    words += ["--trainer.accelerator=gpu", "--trainer.devices=1", f"--trainer.max_steps={STEPS}"]
    words += ["--trainer.log_every_n_steps=1", "--trainer.val_check_interval=250"]
    words += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    main([*words, "--trainer.logger.name=run"])  # would stop at what is not finite
    folder = tmp_path / "run/version_0"
    rows = read_metrics(folder)
    losses = {
        term: [row[term] for row in rows if term in row]
        for term in rows[0]
        if term.startswith("train/loss")
    }
    assert len(losses) == 4  # the total, similarity, smoothness and restoration
    for values in losses.values():
        assert len(values) == STEPS
        assert all(math.isfinite(value) for value in values)
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    for weights in (load_file(folder / "backbone.safetensors"), saved["state_dict"]):
        assert all(value.isfinite().all() for value in weights.values())
    after = [row["val/ncc_after"] for row in rows if "val/ncc_after" in row]
    before = [row["val/ncc_before"] for row in rows if "val/ncc_before" in row]
    scale = saved.get("MixedPrecision", {}).get("scale", 1)
    with capfd.disabled():
        print(
            f"\n{name} {precision}: {STEPS} steps, loss {losses['train/loss'][0]:.3f} -> "
            f"{losses['train/loss'][-1]:.3f}, NCC {before[-1]:.3f} -> {after[-1]:.3f}, "
            f"scale {scale:g}"
        )
    assert after[-1] > before[-1]
    assert scale >= 1
