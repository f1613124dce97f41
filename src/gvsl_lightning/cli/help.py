"""The page of ``--help`` that lists the commands; the options of each are listed by its parser."""

from collections.abc import Collection, Sequence

from gvsl_lightning.errors import InputError, nearest

PAGE = """\
Pre-train 3D backbones on unlabelled CT or MR by geometric visual similarity learning, and use them.

gvsl COMMAND --config NAME [--KEY=VALUE ...]        (also: python -m gvsl_lightning COMMAND ...)

  plan        Look at a folder of volumes, and write a configuration of a pre-training for it.
  fit         Pre-train a backbone on unlabelled volumes, or fine-tune one on labelled volumes.
  validate    Compute the validation metrics of a checkpoint.
  test        Test a checkpoint: a table, and the scores of every case in a file.
  predict     Write label maps, classes or registrations of new volumes.
  prepare     Read and prepare all volumes of a folder once, for fast training.
  profile     Measure the time of each part of a pre-training step, its memory and the whole run.
  features    Segment volumes by the features of a backbone from one labelled volume.
  reproduce   Run a training again from its own record, and compare every logged value.
  benchmark   Compare methods by one plan: pre-train, transfer and test each; make the tables.
  export      Write a network for other programs, and check that it computes the same.

NAME is a shipped configuration, such as gvsl_mri or finetune/hippocampus, or the path of a YAML
file. Every key of the YAML is an option, too; the later of two values wins.

  --data.root=FOLDER                   volumes: folder, pattern, list or dataset.json
  --model.weights=backbone.safetensors the pre-trained backbone for fine-tuning
  --ckpt_path=FILE                     checkpoint of the same run: resume, test or predict with it
  --trainer.max_steps=20000            length of the training
  --trainer.devices=4                  GPUs; half precision: --trainer.precision=bf16-mixed
  --trainer.logger=CSVLogger           another logger of Lightning
  --trainer.callbacks+=FeatureFigure   one more callback
  --test_after_fit=true                test the best checkpoint at the end of fit
  --print_config                       print all settings as one YAML file, and stop
  --model.help=NAME, --data.help=NAME  all options of a class, such as GVSL
  --debug                              errors with a traceback

Examples:
  gvsl fit --config quickstart
  gvsl fit --config gvsl_mri --data.root=FOLDER --trainer.devices=4
  gvsl fit --config segmentation --data.root=IMAGES --data.label_root=LABELS \\
    --model.weights=runs/gvsl/version_0/backbone.safetensors
  gvsl predict --ckpt runs/segmentation/version_0/checkpoints/best.ckpt --root NEW_SCANS

gvsl COMMAND --help lists all options of a command."""


def help_page(words: Sequence[str], commands: Collection[str]) -> str | None:
    """Return the page that lists the commands if the words ask for it, and None otherwise.

    Raises:
        InputError: if there is no such command.
    """
    if not words or words[0] in ("-h", "--help"):
        return PAGE
    if not words[0].startswith("-") and words[0] not in commands:
        raise InputError(f"There is no command {words[0]}; {nearest(words[0], commands)}")
    return None
