"""The page's endpoints as tools for agents, through the client of the Model Context Protocol's own library."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.space_app import SpaceApp

pytest.importorskip("gradio")
pytest.importorskip("mcp")
import anyio
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from mcp.types import CallToolResult, Tool
from options import all_options

pytestmark = pytest.mark.slow


def ask(page: SpaceApp, tool: str, **arguments: Any) -> tuple[dict[str, Tool], CallToolResult]:
    """All tools of a page by their names, and what one of them answers."""

    async def talk() -> tuple[dict[str, Tool], CallToolResult]:
        async with (
            streamablehttp_client(f"{page.url.rstrip('/')}/gradio_api/mcp/") as (incoming, outgoing, _),
            ClientSession(incoming, outgoing) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            return tools, await session.call_tool(tool, arguments)

    return anyio.run(talk)


def test_every_button_is_a_tool_that_says_what_it_takes(page_at_home: SpaceApp) -> None:
    zoo = {"source": "Demo zoo", "zoo_models": ["digits", "signs"], "typed": "", "base": ""}
    tools, answer = ask(page_at_home, "look_up", **zoo)
    running = {"merge", "diagnose", "sweep"}
    light = {"look_up", "classify", "push", "sweep_at", *(f"cancel_{name}" for name in running)}
    assert tools.keys() == running | light
    for name, tool in tools.items():
        inputs = tool.inputSchema["properties"]
        assert tool.description and "CHECKPOINTS" not in tool.description, name
        silent = {name for name, described in inputs.items() if not described.get("description")}
        assert silent == (set(all_options()) if name == "merge" else set()), (name, silent)
        if name in running or name in ("look_up", "classify"):
            assert zoo.keys() <= inputs.keys() and inputs["zoo_models"]["description"].startswith("of the zoo: shapes")
    for name, option in all_options().items():  # which gradio describes only as part of the whole
        assert f" {name} ({option.help}; of " in str(tools["merge"].description)
    assert "digits" in str(answer.content) and "signs" in str(answer.content) and not answer.isError
