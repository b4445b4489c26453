"""Runs on a Slurm cluster: two readable batch files per run, and the verbs that send and scale them.

Invariant: everything that a run does on the cluster stands in `<run folder>/slurm/*.sbatch`, which a person can
read, change and send again with plain `sbatch`; nothing is submitted unless everything can be.
"""
