"""The stand-in's HTTP: bodies in, answers out, and the faults that a test has asked for."""

from __future__ import annotations

import socket
import struct
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from helpers.hub.records import CHUNK, Answer, Fault, HubError, Request

if TYPE_CHECKING:
    from helpers.hub_server import StandInHub

LOGGED_HEADERS = ("Range", "User-Agent", "Content-Length", "Content-Type")


class Server(ThreadingHTTPServer):
    hub: StandInHub
    request_queue_size = 128  # the client opens many connections at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks a connection is nothing to print."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are separate writes: without this each answer waits 40 ms

    def _body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (chunk := self.rfile.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk

    def _serve(self) -> None:
        hub = self.server.hub
        if hub.closed:  # a kept-alive connection must not outlive the hub
            self.close_connection = True
            return
        fault = hub.take_fault(self.command, self.path) or Fault()
        time.sleep(fault.delay)
        if fault.reset:
            self._log(hub, 0)
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        body = self._body()
        if fault.status is not None and not fault.drop_answer:
            answer = Answer(fault.status, {}, fault.body, 0, len(fault.body))
        else:
            try:
                answer = hub.dispatch(self.command, self.path, self.headers, body)
            except HubError as error:
                answer = error.answer
            except Exception:
                answer = Answer.json({"error": traceback.format_exc()}, 500)
        for _ in body:  # what is left unread would be taken for the next request
            pass
        self._log(hub, answer.status)
        if fault.drop_answer:
            self.close_connection = True
            return
        answer.headers.update(fault.headers)
        try:
            self._send(answer, fault)
        except ConnectionError:
            self.close_connection = True

    def _log(self, hub: StandInHub, status: int) -> None:
        kept = {name: self.headers[name] for name in LOGGED_HEADERS if name in self.headers}
        with hub.lock:
            hub.requests.append(Request(self.command, self.path, status, "Authorization" in self.headers, kept))

    def _send(self, answer: Answer, fault: Fault) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(answer.length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = answer.length if fault.cut_after is None else min(fault.cut_after, answer.length)
        sent, flipped = 0, answer.length // 2
        for chunk in answer.chunks():
            if fault.corrupt and sent <= flipped < sent + len(chunk):
                changed = bytearray(chunk)
                changed[flipped - sent] ^= 0xFF
                chunk = bytes(changed)
            self.wfile.write(chunk[: limit - sent])
            sent += len(chunk)
            if sent >= limit:
                break
        if limit < answer.length:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Keep test output clean; the hub has its own log."""
