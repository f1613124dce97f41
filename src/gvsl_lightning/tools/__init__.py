"""Commands beside Lightning's own, entered in ``cli.main.TOOLS``; each has ``main(args)``."""
