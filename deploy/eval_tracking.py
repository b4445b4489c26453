"""An evaluation in MLflow: settings as parameters, the table as metrics and files."""

from __future__ import annotations

import logging
from pathlib import Path

from actors.offline_eval import EvalPlan
from common.evaluation import Report
from common.run_files import SPOOL
from common.tracking.shipper import Shipper, tracking_uri
from common.tracking.spool import Spool
from deploy.eval_screen import TABLE_JSON, TABLE_MARKDOWN

log = logging.getLogger("slipstream.eval")

EXPERIMENT = "slipstream-eval"


def log_report(
    report: Report, plan: EvalPlan, folder: Path, *, uri: str | None, root: Path = Path("runs")
) -> None:
    """Log a report. What MLflow cannot take now stays in the folder's spool; it never fails an evaluation."""
    spool = Spool(folder / SPOOL)
    spool.append("run", 0, {"recipe": {**plan.settings, "sets": list(plan.sets), "limit": plan.limit}})
    spool.append("eval", 0, report.metrics())
    spool.append("end", 0, {"status": "finished"})
    store = tracking_uri(uri, root)
    try:
        shipper = Shipper(folder, store, EXPERIMENT, folder.name)
        end = shipper.deliver()
        if end is not None:
            shipper.finish(end, [folder / TABLE_JSON, folder / TABLE_MARKDOWN])
    except Exception as error:  # MLflow raises a dozen kinds; the results are on disk either way
        log.warning("MLflow at %s could not be reached: %s", store, str(error).splitlines()[0])
