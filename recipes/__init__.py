"""Ready-made configurations for the command ``lightning-sfn``."""
