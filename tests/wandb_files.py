"""Read back what W&B wrote offline, without W&B's server.

A ``.wandb`` file holds protocol buffers in LevelDB's log format:
https://github.com/google/leveldb/blob/main/doc/log_format.md, behind seven bytes of W&B's own.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


@dataclass
class OfflineRun:
    """The record of one offline run."""

    path: Path
    id: str = ""
    sweep_id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def values(self, metric: str) -> dict[int, float]:
        """Trainer's step -> value."""
        rows = (row for row in self.history if metric in row)
        return {row["trainer/global_step"]: row[metric] for row in rows}

    def files(self, panel: str) -> list[Path]:
        """Media files of a panel, in their order."""
        names: list[str] = []
        for row in self.history:
            value = row.get(panel, {})
            names += value.get("filenames", [value["path"]] if "path" in value else [])
        return [self.path.parent / "files" / name for name in names]


def read_runs(folder: Path) -> list[OfflineRun]:
    """All runs below a folder, the oldest first; ends W&B's service, which may write still."""
    wandb.teardown()
    paths = sorted(folder.rglob("offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)
    return [read_run(path) for path in paths]


def read_run(path: Path) -> OfflineRun:
    run = OfflineRun(path)
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.project = record.run.run_id, record.run.project
            run.sweep_id = record.run.sweep_id
            run.name, run.group = record.run.display_name, record.run.run_group
            run.job_type, run.notes = record.run.job_type, record.run.notes
            run.tags = list(record.run.tags)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "history":
            run.history.append(_update({}, record.history.item))
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _update(known: dict[str, Any], items: Any) -> dict[str, Any]:
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = known
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return known


def _records(data: bytes) -> Iterator[Record]:
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place + _HEADER.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER.size:
            place += left
            continue
        _, size, kind = _HEADER.unpack_from(data, place)
        place += _HEADER.size
        parts += data[place : place + size]
        place += size
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
