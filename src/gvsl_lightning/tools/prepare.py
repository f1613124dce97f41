"""``python -m gvsl_lightning prepare``: read and prepare all volumes once, for fast training."""

import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.cli import instantiate_class
from rich.progress import track

from gvsl_lightning.cli.defaults import SEED
from gvsl_lightning.cli.diagnosis import diagnose, parse
from gvsl_lightning.cli.sources import read_yaml, settings
from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.prepared import DType, PreparedFolder
from gvsl_lightning.data.source import VolumeFile, anonymous
from gvsl_lightning.data.volume_writer import Outcome, VolumeWriter
from gvsl_lightning.datamodules.pretrain import PretrainDataModule, absolute
from gvsl_lightning.datamodules.stream import write_stream
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.evaluation.contact_sheet import draw_contact_sheet
from gvsl_lightning.runs.files import save_figure, write_csv
from gvsl_lightning.runs.privacy import hide_paths, pseudonym

REJECTED = 3
"""Status of the process if volumes were rejected."""

_PRINTED = 10
"""Rejected volumes that are printed."""


def main(args: Sequence[str]) -> None:
    """Prepare all volumes and print a summary.

    Volumes are read, turned to RAS, resampled, scaled and cropped once, instead of at every access
    of training. The folder takes the place of ``root``; :mod:`gvsl_lightning.data.prepared`
    describes its files. The same command continues after a stop, and does nothing if nothing has
    changed.

    Args:
        args: the words after ``prepare``: see ``--help``.

    Raises:
        InputError: a path or an option is wrong, or the folder was prepared with other settings.
        SystemExit: with status 3 if volumes were rejected.
    """
    words = list(args)
    configured = _configured(words)
    try:
        parser = _parser(configured)
    except ValueError as error:
        plain = _parser(None)
        raise diagnose(error, plain, plain.prog, settings(words, taken=("data",))) from error
    options = parse(parser, words, taken=("data",))
    module: PretrainDataModule = instantiate_class((), options.data.as_dict())
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    workers = options.workers or cpus
    outcomes = prepare(module, options.out, workers, options.dtype)
    _report(outcomes, PreparedFolder(options.out))
    if options.stream is not None:
        write_stream(PreparedFolder(options.out), options.stream, workers)
        print(f"{options.stream}: the same volumes as a stream.")
    rejected = [outcome.reason for outcome in outcomes if outcome.volume is None]
    if rejected:
        ending = "was rejected:" if len(rejected) == 1 else "were rejected, the first one because"
        count = f"{len(rejected)} of {len(outcomes)} volumes"
        print(f"error: {count} {ending} {rejected[0]}", file=sys.stderr)
        raise SystemExit(REJECTED)


def prepare(
    module: PretrainDataModule, out: str, workers: int = 1, dtype: DType = "float16"
) -> list[Outcome]:
    """Prepare all volumes of a data module that are not prepared yet.

    Args:
        module: the data module.
        out: folder of the prepared volumes.
        workers: processes; 1: this one.
        dtype: type of the stored voxels.

    Returns:
        The result for each volume, in the order of their names.

    Raises:
        InputError: a path is wrong, or the folder was prepared with other settings.
    """
    files = _find(module, out)
    settings = {
        "root": absolute(module.root or ""),
        "label_root": None if module.label_root is None else absolute(module.label_root),
        **module.preparation_settings(),
        "dtype": dtype,
    }
    if module.anonymise:
        files = anonymous(files)
        settings = {"anonymise": True, **hide_paths(settings)}
    folder = PreparedFolder(out)
    folder.claim(settings)
    hide = pseudonym if module.anonymise else str
    writer = VolumeWriter(folder, settings, module.make_preparation(), dtype, hide)
    with folder.in_use():
        outcomes = list(_write_all(writer, files, workers))
        volumes = [outcome.volume for outcome in outcomes if outcome.volume is not None]
        is_changed = folder.write_index(volumes)
        rejected = [{"path": o.source, "reason": o.reason} for o in outcomes if o.volume is None]
        write_csv(folder.path / "rejected.csv", ["path", "reason"], rejected)
        sheet = folder.path / "contact_sheet.png"
        is_changed |= any(outcome.is_new for outcome in outcomes)
        if volumes and (is_changed or not sheet.exists()):
            save_figure(draw_contact_sheet(folder, volumes), sheet, dpi=100)
    return outcomes


def _parser(data: Mapping[str, Any] | None) -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gvsl_lightning prepare",
        description="These options of the data have an effect: --data.root, --data.modality, "
        "--data.window, --data.transforms, --data.spacing, --data.crop_foreground, "
        "--data.channels, --data.label_root.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", help="configuration of pre-training, of which data is taken"
    )
    parser.add_subclass_arguments(
        PretrainDataModule, "data", required=False, help="class and options of the data"
    )
    if data is not None:
        parser.set_defaults({"data": data})
    parser.add_argument("--out", required=True, help="folder of the prepared volumes")
    parser.add_argument(
        "--workers", type=PositiveInt | None, help="processes; by default as many as CPUs"
    )
    parser.add_argument("--dtype", type=DType, default="float16", help="type of the stored voxels")
    parser.add_argument("--stream", help="folder or URL to write the volumes to as a stream, too")
    return parser


def _configured(words: Sequence[str]) -> dict[str, Any] | None:
    """Options of the data in the configurations, of which later ones come first.

    None if a class is given without a configuration: it has defaults of its own.
    """
    paths = [
        word.partition("=")[2] or following
        for word, following in zip(words, [*words, ""][1:], strict=True)
        if word == "--config" or word.startswith("--config=")
    ]
    data: dict[str, Any] = {"class_path": "gvsl_lightning.datamodules.PretrainDataModule"}
    is_class_given = any(word == "--data" or word.startswith("--data=") for word in words)
    contents = [OmegaConf.create(read_yaml(path)) for path in paths]
    if not contents:
        return None if is_class_given else data
    named = ", ".join(paths)
    try:
        merged: Any = OmegaConf.merge({"seed_everything": SEED}, *contents)
        found = merged.get("data")
        if OmegaConf.is_config(found):
            found = OmegaConf.to_container(found, resolve=True)
    except (ValueError, OmegaConfBaseException) as error:
        raise InputError(f"{named} cannot be read ({cause_of(error)}); correct it.") from error
    if isinstance(found, str):
        found = {"class_path": found}
    if not isinstance(found, dict):
        raise InputError(
            f"{named} has no data with class_path and init_args, which prepare takes of it; add "
            "that, or leave --config out."
        )
    return {**data, **found}


def _find(module: PretrainDataModule, out: str) -> list[VolumeFile]:
    if module.root is None:
        raise InputError("root is missing; add --data.root=FOLDER.")
    roots = [module.root] if isinstance(module.root, str) else module.root
    for kind, taken in (("volumes", roots), ("label maps", [module.label_root])):
        if absolute(out) in [absolute(path) for path in taken if path is not None]:
            raise InputError(f"{out} holds the {kind} themselves; give another folder as --out.")
    module.prepare_data()
    files = find_volumes(module.root, module.label_root, duplicates="drop")
    if module.label_root is not None and not any(file.label for file in files):
        raise InputError(
            f"{module.label_root} holds no label map that is named like a volume, such as "
            f"{files[0].name}; correct label_root or the names."
        )
    return files


def _write_all(
    writer: VolumeWriter, files: Sequence[VolumeFile], workers: int
) -> Iterator[Outcome]:
    # in an order of its own, so that processes that work in one folder share the volumes
    order = random.Random(os.getpid()).sample(range(len(files)), len(files))  # nosec B311
    mixed = [files[index] for index in order]
    if workers == 1:
        found = list(track(map(writer, mixed), "Preparing volumes", len(files)))
    else:
        found = _write_in_processes(writer, mixed, workers)
    outcomes = dict(zip(order, found, strict=True))
    return (outcomes[index] for index in range(len(files)))


def _write_in_processes(
    writer: VolumeWriter, files: Sequence[VolumeFile], workers: int
) -> list[Outcome]:
    others = set(active_children())
    context = get_context("fork")  # others import everything anew in each process
    with ProcessPoolExecutor(
        min(workers, len(files)), context, initializer=_start_worker, initargs=(writer,)
    ) as pool:
        # not pool.map, which cancels pending calls; ending the processes then fails
        futures = [pool.submit(_work, file) for file in files]
        found = (future.result() for future in futures)
        try:
            return list(track(found, "Preparing volumes", len(files)))
        except BrokenProcessPool as error:
            raise InputError(
                "A process that prepared volumes was killed, perhaps for want of memory; give "
                "the same command again, with fewer --workers."
            ) from error
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()  # files appear only when they are complete
            raise


_writer: VolumeWriter | None = None


def _start_worker(writer: VolumeWriter) -> None:
    global _writer
    _writer = writer
    gc.freeze()  # or garbage collection copies all that this process shares with its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this process when the one that started it is killed, which it would not notice."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(file: VolumeFile) -> Outcome:
    assert _writer is not None
    return _writer(file)


def _report(outcomes: Sequence[Outcome], folder: PreparedFolder) -> None:
    rejected = [outcome.reason for outcome in outcomes if outcome.volume is None]
    new = sum(outcome.is_new for outcome in outcomes)
    old = len(outcomes) - new - len(rejected)
    for reason in rejected[:_PRINTED]:
        print(f"rejected: {reason}")
    done = f"{new} prepared" if new else "nothing to prepare"
    print(f"{folder.path}: {done}, {old} up to date, {len(rejected)} rejected.")
    if rejected:
        print(f"All reasons: {folder.path / 'rejected.csv'}")
    unused = folder.count_unused([o.volume for o in outcomes if o.volume is not None])
    if unused:
        print(
            f"Not used, but kept in {folder.volumes_path}: {unused} volumes whose source is gone "
            "or rejected."
        )
