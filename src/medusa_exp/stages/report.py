"""Stage report: write report.html from the files of the run directory."""

import logging
from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.runs.extras import lacking
from medusa_exp.stages.session import Session

log = logging.getLogger(__name__)


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Write the report; it adds no number.

    Raises:
        UserError: packages are missing, and there is nothing else to do. After other stages, whose
            work is done, that is a warning.
    """
    if missing := lacking("report", "report.html"):
        if config.stages == ["report"]:
            raise UserError(f"{missing}.")
        log.warning("%s; stages=[report] run_dir=%s then writes it", missing, out)
        return {}
    from medusa_exp.tracking.run_report import write_report

    write_report(out)
    return {}
