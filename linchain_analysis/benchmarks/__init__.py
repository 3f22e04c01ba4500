"""What the package costs: the tracker, the adapters and the log, each measured against an alternative in turns."""
