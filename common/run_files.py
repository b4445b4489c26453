"""Names of the files and folders in a run folder.

Invariant: each is spelled out here and, of necessity, in the batch files' templates; who reads a file and who writes
it take its name from here.
"""

from __future__ import annotations

RECIPE_FILE = "recipe.toml"  # resolved
ADDRESS_FILE = "broker.json"  # where the broker is, while there is one
LOCK_FILE = "broker.lock"  # held by the broker
JOURNAL_FOLDER = "journal"
LEDGER_FILE = "ledger.sqlite"  # in the journal's folder
SPOOL = "metrics.jsonl"  # every point of the run
SUMMARY_FILE = "summary.json"  # written at the end, as is the figure
FIGURE_FILE = "progress.png"
CHECKPOINTS_FOLDER = "checkpoints"
EXPORT_FOLDER = "hf"  # of a checkpoint: the model in the format of Hugging Face
OUTCOME_FILE = "learner.exit"  # the exit code of a rank that a restart does not cure
STARTS_FILE = "learner.starts"  # how often the learner has started at the step where it stands
SLURM_FOLDER = "slurm"  # batch files, logs and state of a submitted run
SLURM_STATE_FILE = "state.json"  # in it
