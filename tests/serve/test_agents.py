"""Agents of other makers, where they are installed: they call a function that the served model asks for."""

import asyncio

import pytest
from openai import AsyncOpenAI
from serving import loaded, make_service, served
from tool_case import TEMPLATE, Planned

from sinkstream.serve import conversation

MODEL, QUESTION = "tiny-llama", "Rain?"
CALL = '<tool_call>\n{"name": "rain", "arguments": {"day": 3}}\n</tool_call>'


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(conversation, "Reply", Planned)
    with served(make_service(loaded(template=TEMPLATE), cap=1024)) as address:
        yield AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("api", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
@pytest.mark.parametrize("stream", [False, True])
def test_openai_agents(client, api, stream):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    asked: list[int] = []

    @agents.function_tool
    def rain(day: int) -> str:
        """Whether it rains."""
        asked.append(day)
        return "wet"

    agent = agents.Agent(
        name="a", instructions="Be brief.", tools=[rain], model=getattr(agents, api)(model=MODEL, openai_client=client)
    )

    async def run():
        if not stream:
            return await agents.Runner.run(agent, QUESTION)
        found = agents.Runner.run_streamed(agent, QUESTION)
        async for _ in found.stream_events():
            pass
        return found

    Planned.said[:] = [CALL, "It is wet."]
    found = asyncio.run(run())
    assert found.final_output == "It is wet." and asked == [3]
    if not stream:
        first, second = (response.usage for response in found.raw_responses)
        assert second.input_tokens_details.cached_tokens == first.input_tokens + len(CALL), "nothing is computed twice"


@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(client, api):
    ai, models = pytest.importorskip("pydantic_ai"), pytest.importorskip("pydantic_ai.models.openai")
    from pydantic import BaseModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Rain(BaseModel):
        day: int

    model = getattr(models, api)(MODEL, provider=OpenAIProvider(openai_client=client))
    agent, asked = ai.Agent(model), []

    @agent.tool_plain
    def rain(day: int) -> str:
        """Whether it rains."""
        asked.append(day)
        return "wet"

    Planned.said[:] = [CALL, "It is wet.", " 3}}\n</tool_call>"]
    assert agent.run_sync(QUESTION).output == "It is wet." and asked == [3]
    assert ai.Agent(model, output_type=Rain).run_sync(QUESTION).output == Rain(day=3), "the call is forced"
