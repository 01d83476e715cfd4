"""Stage report: write report.html from the files of the run directory."""

from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.stages.session import Session
from medusa_exp.tracking.run_report import write_report


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Write the report; it adds no number."""
    write_report(out)
    return {}
