"""The command line: Lightning's own, in subclass mode, and the tools beside it."""

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from threading import current_thread, main_thread
from typing import Any

import pytorch_lightning as pl
from jsonargparse import ArgumentError, set_parsing_settings
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.exceptions import SIGTERMException

import gvsl_lightning.callbacks
import gvsl_lightning.datamodules
import gvsl_lightning.tasks  # noqa: F401  # imported classes can be named without their module
from gvsl_lightning import __version__
from gvsl_lightning.callbacks import PredictionWriter, RegistrationWriter
from gvsl_lightning.callbacks.run_config import RunConfig
from gvsl_lightning.cli.checks import check_inputs, refuse_secrets, require_run, settle_run
from gvsl_lightning.cli.defaults import SEED, run_defaults
from gvsl_lightning.cli.diagnosis import parse, reason, with_place
from gvsl_lightning.cli.from_checkpoint import with_checkpoint
from gvsl_lightning.cli.help import help_page
from gvsl_lightning.cli.sources import with_config_paths
from gvsl_lightning.errors import InputError, causes
from gvsl_lightning.runs.faults import explain
from gvsl_lightning.runs.files import unwritable
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.runs.interruption import interruptible
from gvsl_lightning.runs.loggers import finish_runs
from gvsl_lightning.runs.run_guard import RunGuard
from gvsl_lightning.weights import read_checkpoint

TOOLS = {
    "benchmark": "gvsl_lightning.benchmark.runner",
    "export": "gvsl_lightning.export.exporter",
    "features": "gvsl_lightning.tools.features",
    "plan": "gvsl_lightning.tools.plan",
    "prepare": "gvsl_lightning.tools.prepare",
    "profile": "gvsl_lightning.tools.profile",
    "reproduce": "gvsl_lightning.tools.reproduce",
}
"""Commands beside fit, validate, test and predict: their modules, imported when they are called."""

COMMANDS = (*LightningCLI.subcommands(), *TOOLS)
"""Names of all commands."""

DEBUG = "--debug"
"""Word, anywhere in a command line, that lets every error end in its traceback."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command, as ``python -m gvsl_lightning`` does.

    Args:
        args: the words of the command line, without the program's name; those of the process if
            None. ``--debug`` among them lets every error through.

    Raises:
        SystemExit: after one sentence on stderr: with status 2 after bad input, or where the system
            refuses a file, 130 after SIGINT, 143 after SIGTERM and 1 after another fault that is no
            error of the code. In a SLURM job and a trial of a W&B sweep, with status 0 after the
            step in which SIGTERM arrives; in the trial SIGINT, too.
    """
    given = list(sys.argv[1:] if args is None else args)
    words = [word for word in given if word != DEBUG]
    if "WANDB_SWEEP_ID" in os.environ and current_thread() is main_thread():
        # W&B ends a bad trial by SIGTERM from its agent or SIGINT from within, which comes first;
        # Lightning would break off the step at SIGINT, and the agent count a failure
        signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    exit_code = 1
    _silence_other_packages()
    with interruptible():
        try:
            if page := help_page(words, COMMANDS):
                print(page)
                exit_code = 0
                return
            words = with_checkpoint(with_config_paths(words))
            if words and words[0] in TOOLS:
                if "--out=" in words:  # a variable of the shell that is not set
                    raise InputError("--out is empty; give a path.")
                import_module(TOOLS[words[0]]).main(words[1:])
            else:
                CommandLine(words)
            exit_code = 0
        except SIGTERMException:
            # against a second one, while loggers still finish
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            exit_code = 0
            raise
        except BaseException as error:
            sentence, exit_code = _sentence(error, words)
            if sentence is None or DEBUG in given:
                raise
            if sentence:
                print(f"error: {sentence}", file=sys.stderr)
            raise SystemExit(exit_code) from None
        finally:
            finish_runs(exit_code)


def _silence_other_packages() -> None:
    """Hide advertisements, and warnings that a user of the command line cannot act on."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: not str(record.msg).startswith(_QUIET)
    )
    for message in (
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
        "The number of training batches .* is smaller than the logging interval.*",
        "Total length of `list` across ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message)


_QUIET = ("💡 Tip: ", "Tip: ", "Trainer already configured", "TPU available")
"""Beginnings of lines of Lightning that tell a user nothing."""


def _sentence(error: BaseException, words: Sequence[str]) -> tuple[str | None, int]:
    """Return the sentence about an error and the exit status; no sentence for an unknown error."""
    if ended := explain(error, words):
        return str(ended), ended.status
    # one from a constructor arrives as the cause of the command line's own error,
    # one from a loader process behind that process's traceback
    found = causes(error) if isinstance(error, ValueError) else ()
    cause = next((one for one in found if isinstance(one, InputError)), None)
    operation, undetermined, _ = str(error).partition(" does not have a deterministic impl")
    if cause is None and undetermined:
        return f"{operation} is not deterministic; set trainer.deterministic to warn or false.", 2
    if cause is None:
        refused = unwritable(error) if isinstance(error, OSError) else None
        return refused, 2 if refused else 1
    sentence = str(cause).strip().splitlines()[-1].rpartition("InputError: ")[-1]
    return with_place(sentence, cause.key, words) if cause.key else sentence, 2


def _hyper_parameters(path: Any) -> dict[str, Any]:
    """Hyper-parameters of the model in a checkpoint that exists."""
    if not path or not Path(path).is_file():
        return {}
    hyper_parameters: dict[str, Any] = read_checkpoint(Path(path), mmap=True)["hyper_parameters"]
    return hyper_parameters


_PARSER = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}
"""Options of all parsers; an abbreviated option could come to mean another one."""


class CommandLine(LightningCLI):
    """Lightning's command line with what the project fixes.

    Args:
        args: the words of the command line; those of the process if None.
        run: run the subcommand; False only builds trainer, model and data.
        add_arguments: adds arguments to the parser, for tools.
    """

    def __init__(
        self,
        args: Sequence[str] | None = None,
        run: bool = True,
        add_arguments: Callable[[Any], None] | None = None,
    ) -> None:
        self._runs, self._add_more = run, add_arguments
        self._parsers: list[Any] = []
        self._words = list(sys.argv[1:] if args is None else args)
        commands = LightningCLI.subcommands() if run else ()
        command = next((word for word in self._words if word in commands), "")
        self._defaults = run_defaults(self._words, command)
        # interpolation (${...}) that survives several --config and overrides
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunConfig,
            seed_everything_default=SEED,
            parser_kwargs={
                "prog": "python -m gvsl_lightning",
                "version": __version__,
                **_PARSER,
                **{name: dict(_PARSER) for name in LightningCLI.subcommands()},
            },
            args=None if args is None else list(args),
            run=run,
        )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer; an InputError names an option that it refuses."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"The trainer refuses its options: {reason(error)}.") from error
        trainer.callbacks.insert(0, RunGuard(self._words))  # type: ignore[attr-defined]
        return trainer

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the words given, without a warning that the process has words of its own."""
        parsers = zip(LightningCLI.subcommands() if self._runs else (), self._parsers, strict=False)
        self.config = parse(parser, self._words, commands=dict(parsers))

    def _parse_ckpt_path(self) -> None:
        """Take the checkpoint's hyper-parameters, as Lightning does, but let explicit words win."""
        command = self.config.get("subcommand")
        if not command:  # a tool
            return
        path: Any = self.config[command].get("ckpt_path")
        if path and Path(path).is_file():
            require_run(Path(path), self.config[command].model, command == "fit")
        words = " ".join(self._words)
        given = set(re.findall(r"--model\.(?:init_args\.)?(\w+)", words)) - {"class_path"}
        model: Any = self.config.get(command, {}).get("model")
        kept = {key: model["init_args"][key] for key in given if key in (model or {})["init_args"]}
        stored = _hyper_parameters(path)
        if stored and "_class_path" not in stored:  # of a run without the command line
            for key, value in {**stored, **kept}.items():
                if key in model["init_args"]:
                    model["init_args"][key] = value
            return
        try:
            super()._parse_ckpt_path()
        except (ArgumentError, ValueError) as error:
            raise InputError(f"{path} does not fit the model: {reason(error)}.") from error
        left: Any = self.config[command].model.get("dict_kwargs") if path else None
        if left and self.config[command].model.class_path.startswith("gvsl_lightning."):
            raise InputError(
                f"{path} was written by another version, whose {', '.join(left)} this one does not "
                "have; give another checkpoint."
            )
        for key, value in kept.items():
            self.config[command]["model"]["init_args"][key] = value

    def before_instantiate_classes(self) -> None:
        """Check the configuration and settle folders and W&B's run before anything is built."""
        command = self.config.get("subcommand")
        if not command:  # a tool
            return
        config: Any = self.config[command]
        refuse_secrets(config)
        if config.get("weights_only") is False:
            raise InputError(
                "weights_only is false, which would let a checkpoint run code: leave it out."
            )
        if config.trainer.precision in ("64", "64-true", 64):
            raise InputError(
                "trainer.precision is 64-true; geometry and losses are computed in float32: set "
                "32-true."
            )
        config.weights_only = True  # not what Lightning takes otherwise for a URL
        path: Any = config.get("ckpt_path")
        if path in ("best", "last", "hpc") or "://" in (path or ""):
            path = None
        if path and not Path(path).is_file():
            raise InputError(f"{path}, the checkpoint, does not exist; correct --ckpt_path.")
        if command == "predict" and config.return_predictions is None:
            # nobody takes them from the command line, and a folder of volumes would fill the memory
            config.return_predictions = False
        settle_run(config, command, self._words, path)

    def before_fit(self) -> None:
        """Look at checkpoint, weights and data before loggers start a run."""
        command = self.config.subcommand
        check_inputs(self.model, self.datamodule, command, self.config[command].ckpt_path)

    before_validate = before_test = before_fit

    def before_predict(self) -> None:
        """Look at the folder of the results, too."""
        self.before_fit()
        options = self.config.predict
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter | RegistrationWriter) and self.datamodule:
                callback.folder = options.out or callback.folder
                callback.overwrite = options.overwrite or callback.overwrite
                callback.check_folder(self.trainer, self.datamodule)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a subcommand; an error of writing that names no file then names the run's folder."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if ended := explain(error, self._words, self.trainer):
                raise ended from error
            if isinstance(error, UnpicklingError):
                raise InputError(
                    f"{self.config[subcommand].ckpt_path or 'The checkpoint'} is corrupted, or "
                    "holds pickled Python objects, which could run code and are not opened: give "
                    "another checkpoint."
                ) from error
            if isinstance(error, OSError) and error.filename is None and unwritable(error):
                error.filename = str(run_folder(self.trainer))
            raise

    def after_fit(self) -> None:
        """Test the best checkpoint in the same process, if asked to."""
        if not self.config.fit.test_after_fit:
            return
        if not getattr(self.trainer.checkpoint_callback, "best_model_path", ""):
            raise InputError(
                "test_after_fit tests the best checkpoint and there is none: add "
                "ResumableCheckpoint with a monitor to trainer.callbacks."
            )
        self.trainer.test(
            self.model, datamodule=self.datamodule, ckpt_path="best", weights_only=True
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add what the subcommands share, and a tool's own arguments."""
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="at the end of fit, test the best checkpoint; its table lies in the same folder",
        )
        parser.add_argument(
            "--out", type=str | None, default=None, help="folder of the results of predict"
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="predict again if a result is there"
        )
        parser.set_defaults(self._defaults)
        self._parsers.append(parser)
        if self._add_more:
            self._add_more(parser)
