"""Makes the demo zoo in the background where it is not there yet, and says how far it is."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import charts
import jobs
from selection import Zoo


@dataclass
class ZooMaker:
    """One for the whole page, whoever looks at it."""

    zoo: Zoo
    event: jobs.Event = field(default_factory=jobs.Progress)

    def start(self) -> None:
        """Begin, if there is anything to do."""
        if not self.zoo.is_ready:
            threading.Thread(target=self._make, name="zoo", daemon=True).start()

    def banner(self) -> str:
        """What the page says about it; empty once the zoo is there."""
        if self.zoo.is_ready:
            return ""
        if isinstance(self.event, jobs.Failed):
            return charts.notice(f"The demo zoo could not be made: {self.event.message}", "bad")
        bar = charts.progress_bar(self.event.share if isinstance(self.event, jobs.Progress) else 1.0, self._doing())
        return (
            "<div class='ep-notice ep-info'><b>The demo zoo is being made, once: four small models, trained on this "
            "machine.</b> It takes about three minutes. Checkpoints from the Hub can be merged meanwhile."
            f"{bar}</div>"
        )

    def _doing(self) -> str:
        text = self.event.text if isinstance(self.event, jobs.Progress) else "done"
        return text[:1].upper() + text[1:]

    def _make(self) -> None:
        for event in jobs.run("build_zoo", str(self.zoo.folder)):
            self.event = event
