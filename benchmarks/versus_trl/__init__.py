"""A whole run against TRL's GRPOTrainer: seconds until the mean training reward is 0.80. See `__main__`."""
