"""Files around a run: checkpoints, record, loggers, faults, privacy."""
