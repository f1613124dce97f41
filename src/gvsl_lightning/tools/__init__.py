"""Commands beside Lightning's own: each module has ``main(args)``, entered in ``cli.TOOLS``."""
