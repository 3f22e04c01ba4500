"""From optimiser hooks to a run, in three ways: a raw loop, a Trainer, an unchanged script."""
