"""Commands beside Lightning's own, entered in ``cli.TOOLS``.

Each module has ``main(args)`` and its page of help, ``HELP``, whose first line says what it does.
"""
