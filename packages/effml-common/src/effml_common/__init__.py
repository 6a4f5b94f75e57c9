"""The thin floor under the effml packages: command lines, run logs and reports, checkpoints."""
