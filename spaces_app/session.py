"""Who waits for what: visitors' tickets, what runs now, and what all tabs need to know.

gradio's queue lets one piece of heavy work run at a time; a ticket is how its visitor takes it back, queued or running.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import jobs
from selection import Selection, Zoo, selection_of
from settings import Settings
from workspace import Workspace, make_room


@dataclass
class Session:
    """What the tabs share."""

    settings: Settings
    workspace: Workspace
    zoo: Zoo
    tickets: dict[tuple[str, str], jobs.Ticket] = field(default_factory=dict)
    running: set[tuple[str, str]] = field(default_factory=set)

    def selection(self, *chosen: Any) -> Selection:
        """What the inputs of the chooser say; see `selection_of`."""
        return selection_of(self.settings, self.zoo, *chosen)

    def take_ticket(self, request: gr.Request, what: str) -> str:
        """A visitor has pressed the button; how long it may take until something happens."""
        key = (visitor_of(request), what)
        self.tickets[key] = jobs.Ticket()
        return "Waiting for other work to end" if self.running - {key} else "Starting"

    def cancel(self, request: gr.Request, what: str) -> None:
        """The visitor does not want it any more."""
        if ticket := self.tickets.get((visitor_of(request), what)):
            ticket.cancelled.set()

    def work(
        self, request: gr.Request, what: str, function: str, *arguments: Any, keep: bool = False
    ) -> Iterator[jobs.Event]:
        """Run heavy work with a fresh folder as its last argument.

        Args:
            what: the name of the button.
            function: of `work`.
            keep: the folder, if there is a result; then it takes the place of the visitor's last one.
        """
        key = (visitor_of(request), what)
        ticket = self.tickets.setdefault(key, jobs.Ticket())
        if self.settings.on_space:
            make_room(3 * self.settings.bytes)  # its downloads, its merge, and the zip of that
        folder = self.workspace.fresh(key[0], what)
        self.running.add(key)
        event: jobs.Event = jobs.Failed("")
        try:
            for event in jobs.run(function, *arguments, str(folder), ticket=ticket, seconds=self.settings.seconds):
                yield event
        finally:
            self.running.discard(key)
            self.tickets.pop(key, None)
            if keep and isinstance(event, jobs.Done):
                self.workspace.keep(folder)
            else:
                self.workspace.discard(folder)

    def leave(self, request: gr.Request) -> None:
        """A visitor has closed the page: their work ends and their folders go."""
        visitor = visitor_of(request)
        for (owner, _), ticket in list(self.tickets.items()):
            if owner == visitor:
                ticket.cancelled.set()
        self.workspace.leave(visitor)


def visitor_of(request: gr.Request) -> str:
    """One open page, or one client of the API."""
    return str(request.session_hash)
