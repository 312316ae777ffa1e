"""`RunReport`: a page about the run."""

from pathlib import Path

from xpo_lightning.callbacks.at_end import MadeAtEnd
from xpo_lightning.reporting.page import write_report
from xpo_lightning.reporting.run_files import RunFiles


class RunReport(MadeAtEnd):
    """Writes a page about the run at the end of training, and when somebody asks for it to stop.

    It shows what lies in the run's folder then: curves from `metrics.csv`, for which it needs a `ResumableCSVLogger`
    or a `CSVLogger` among the loggers, completions where there is a `CompletionsTable`, models and versions where there
    is a `RunSummary`. `xpo report` writes it at any other time.

    Args:
        file: Where to write; a relative path starts in the run's folder. HTML.
    """

    kind, suffix = "report", ".html"

    def __init__(self, file: str = "report.html") -> None:
        super().__init__(file)

    def make(self, metrics: Path, path: Path) -> None:
        """Write."""
        write_report(RunFiles(metrics), path)
