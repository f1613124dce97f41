"""Help on one screen for every command; ``--help=all`` is what the parsers say of every option."""

import re
from collections.abc import Mapping, Sequence
from importlib import import_module

from gvsl_lightning.errors import InputError, nearest


def help_page(words: Sequence[str], tools: Mapping[str, str]) -> str | None:
    """What ``--help`` prints, or a command line without words.

    Args:
        words: of the command line.
        tools: the module of each command beside Lightning's.

    Returns:
        A page; None if none is asked for, or a tool has none but its parser's.

    Raises:
        InputError: there is no such command.
    """
    commands = [*PAGES, *tools]
    if words and not words[0].startswith("-") and words[0] not in commands:
        advice = nearest(words[0], commands)
        raise InputError(f"There is no command {words[0]}; {advice}")
    if words and not {"-h", "--help"} & set(words):
        return None
    if command := next((word for word in words if word in commands), None):
        return _with_debug(PAGES.get(command) or _tool_page(tools[command]))
    lines = [f"  {name:10} {(page or name).splitlines()[0]}" for name, page in PAGES.items()]
    for name, module in tools.items():
        page = _tool_page(module) or f"See python -m gvsl_lightning {name} --help."
        lines.append(f"  {name:10} {page.splitlines()[0]}")
    return _ALL_COMMANDS.format(commands="\n".join(lines))


def in_full(words: Sequence[str]) -> list[str]:
    """The words with which the parsers list every option where ``--help=all`` is among them."""
    return ["--help" if word == "--help=all" else word for word in words]


def _with_debug(page: str | None) -> str | None:
    found = re.search(r"^  --help=all +", page or "", flags=re.MULTILINE)
    return page and f"{page}\n{'  --debug':{len(found[0]) if found else 0}}errors with a traceback"


def _tool_page(module: str) -> str | None:
    page = getattr(import_module(module), "HELP", None)
    return None if page is None else str(page).rstrip()


_ALL_COMMANDS = """\
Pre-train 3D backbones on unlabelled CT or MR by geometric visual similarity learning, and use them.

python -m gvsl_lightning COMMAND --config FILE [--KEY=VALUE ...]

{commands}

Examples:
  python -m gvsl_lightning fit --config configs/quickstart.yaml
  python -m gvsl_lightning fit --config configs/pretrain/gvsl.yaml --data.init_args.root=FOLDER
  python -m gvsl_lightning prepare --config configs/pretrain/gvsl.yaml --data.root=FOLDER --out=OUT

More:
  python -m gvsl_lightning COMMAND --help        a command on one screen
  python -m gvsl_lightning COMMAND --help=all    all its options
  python -m gvsl_lightning COMMAND --debug       errors with a traceback
  python -m gvsl_lightning --version"""

_SETTINGS = """\
Every key of the YAML files is an option, too. Of files and options, the later ones win."""

_MORE = """\
More:
  --print_config                       print all settings as one YAML file, and stop
  --help=all                           all options of this command and of the trainer
  --model.help=NAME, --data.help=NAME  all options of a class, such as GVSL or PretrainDataModule"""

_FIT = f"""\
Train: pre-train a backbone on unlabelled volumes, or fine-tune one on labelled ones.

python -m gvsl_lightning fit --config FILE [--config FILE ...] [--KEY=VALUE ...]

{_SETTINGS}

  --config FILE                        settings of a run; many to start from are in configs/
  --data.init_args.root=FOLDER         volumes: folder, pattern, list or dataset.json
  --data.init_args.batch_size=2        pairs or volumes of each process and step
  --data.init_args.num_workers=4       loader processes
  --model.init_args.backbone=NAME      unet, basic_unet, dynunet, segresnet or swin_unetr
  --model.init_args.learning_rate=1e-4
  --model.init_args.weights=FILE       fine-tuning: the pre-trained backbone
  --trainer.max_steps=20000            length of the training
  --trainer.devices=4                  GPUs; half precision: --trainer.precision=bf16-mixed
  --trainer.logger=CSVLogger           or another logger of Lightning
  --trainer.callbacks+=FeatureFigure   one more callback
  --ckpt_path=FILE                     go on from a checkpoint of the same run
  --test_after_fit=true                test the best checkpoint at the end
  --seed_everything=1                  of everything random

Examples:
  python -m gvsl_lightning fit --config configs/quickstart.yaml
  python -m gvsl_lightning fit --config configs/pretrain/gvsl.yaml --data.init_args.root=FOLDER
  python -m gvsl_lightning fit --config configs/pretrain/gvsl_mri.yaml \\
    --data.init_args.root=FOLDER --trainer.devices=4 --trainer.precision=bf16-mixed
  python -m gvsl_lightning fit --config configs/finetune/segmentation.yaml \\
    --data.init_args.root=IMAGES --data.init_args.label_root=LABELS \\
    --model.init_args.weights=backbone.safetensors

{_MORE}"""

_VALIDATE = f"""\
Compute the validation metrics of a checkpoint.

python -m gvsl_lightning validate --config FILE --ckpt_path=FILE [--KEY=VALUE ...]

{_SETTINGS}

  --config FILE                        settings: those of the training
  --ckpt_path=FILE                     checkpoint of the training
  --data.init_args.root=FOLDER         volumes: folder, pattern, list or dataset.json
  --trainer.limit_val_batches=10       only some of them

Examples:
  python -m gvsl_lightning validate --config configs/quickstart.yaml \\
    --ckpt_path=runs/quickstart/version_0/checkpoints/best.ckpt
  python -m gvsl_lightning validate --config configs/pretrain/gvsl.yaml \\
    --data.init_args.root=FOLDER --ckpt_path=runs/gvsl/version_0/checkpoints/last.ckpt

{_MORE}"""

_TEST = f"""\
Test a checkpoint on the test volumes: a table, and the scores of every case in a file.

python -m gvsl_lightning test --config FILE --ckpt_path=FILE [--KEY=VALUE ...]

{_SETTINGS}

  --config FILE                        settings: those of the training
  --ckpt_path=FILE                     checkpoint of the training
  --data.init_args.root=FOLDER         volumes: folder, pattern, list or dataset.json
  --data.init_args.label_root=FOLDER   label maps named like the volumes

Examples:
  python -m gvsl_lightning test --config configs/quickstart.yaml \\
    --ckpt_path=runs/quickstart/version_0/checkpoints/best.ckpt
  python -m gvsl_lightning test --config configs/finetune/segmentation.yaml \\
    --data.init_args.root=IMAGES --data.init_args.label_root=LABELS \\
    --ckpt_path=runs/segmentation/version_0/checkpoints/best.ckpt

{_MORE}"""

_PREDICT = f"""\
Write what a model says of new volumes: label maps, classes, registrations to an atlas.

python -m gvsl_lightning predict --config FILE --ckpt_path=FILE [--KEY=VALUE ...]

{_SETTINGS}

  --config FILE                        settings: those of the training
  --ckpt_path=FILE                     checkpoint of the training
  --data.init_args.root=FOLDER         new volumes: folder, pattern, list or dataset.json
  --data=RegistrationDataModule        register them to --data.init_args.atlas

Examples:
  python -m gvsl_lightning predict --config configs/finetune/segmentation.yaml \\
    --data.init_args.root=NEW_SCANS \\
    --ckpt_path=runs/segmentation/version_0/checkpoints/best.ckpt
  python -m gvsl_lightning predict --config configs/pretrain/gvsl_mri.yaml \\
    --ckpt_path=runs/gvsl_mri/version_0/checkpoints/best.ckpt \\
    --data=RegistrationDataModule --data.init_args.root=FOLDER \\
    --data.init_args.atlas=ATLAS.nii.gz --data.init_args.modality=mri \\
    --trainer.callbacks+=RegistrationWriter

{_MORE}"""

PAGES = {"fit": _FIT, "validate": _VALIDATE, "test": _TEST, "predict": _PREDICT}
"""Lightning's commands; a tool has its page in its own module."""
