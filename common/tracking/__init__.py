"""From a run's points to MLflow: the spool on disk, the names of all metrics, the delivery."""
