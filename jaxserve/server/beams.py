"""Beam search behind completions and chat: a generation whose updates are the search's result."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from jaxserve.beam_search import Beam, BeamSearch, BeamSearchParams, Candidates
from jaxserve.engine.request import Request, Update
from jaxserve.errors import EngineStopped
from jaxserve.server.generate import Generation, start
from jaxserve.server.protocol.common import GenerationFields
from jaxserve.server.state import ServerState


class BeamUpdates:
    """Stands where an `UpdateStream` does: the first `take` runs the search to its end.

    Belongs to the event loop's thread.
    """

    def __init__(
        self,
        state: ServerState,
        prompts: Sequence[Sequence[Request]],  # each prompt's samples: as many as beams
        params: BeamSearchParams,
    ) -> None:
        _, info, _ = state.loaded()
        self.is_finished = False
        self._state = state
        self._prompts = prompts
        self._searches = [
            BeamSearch(
                samples[0].prompt_tokens,
                params,
                eos_tokens=info.eos_tokens,
                max_model_len=info.max_model_len,
            )
            for samples in prompts
        ]
        self._numbers = itertools.count()

    async def take(self) -> list[Update]:
        """Returns the whole of every sample."""
        while await self._step():
            pass
        self.is_finished = True
        return [
            _update_of(beam, sample)
            for search, samples in zip(self._searches, self._prompts, strict=True)
            for beam, sample in zip(search.best(), samples, strict=False)
        ]

    def drop(self, request_id: str) -> None:
        """Does nothing: what has been taken runs no more."""

    async def __aenter__(self) -> BeamUpdates:
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Does nothing: each step ends its own requests."""

    async def _step(self) -> bool:
        """Gives every running beam its next token; returns False when none runs."""
        requests: list[Request] = []
        owners: list[tuple[BeamSearch, int]] = []  # a search and how many requests are its
        for search, samples in zip(self._searches, self._prompts, strict=True):
            prompts = search.prompts
            requests += [self._request(samples[0], search, prompt) for prompt in prompts]
            if prompts:
                owners.append((search, len(prompts)))
        if not requests:
            return False
        found = await self._candidates(requests)
        answers = iter([found[request.request_id] for request in requests])
        for search, count in owners:
            search.advance(list(itertools.islice(answers, count)))
        return True

    def _request(self, sample: Request, search: BeamSearch, prompt: tuple[int, ...]) -> Request:
        return dataclasses.replace(
            sample,
            request_id=f"{sample.request_id}-beam-{next(self._numbers)}",
            prompt_tokens=prompt,
            params=search.step_params,
        )

    async def _candidates(self, requests: Sequence[Request]) -> dict[str, Candidates]:
        engine, _, _ = self._state.loaded()
        found: dict[str, Candidates] = {}
        async with await engine.submit(requests) as updates:
            while not updates.is_finished:
                for update in await updates.take():
                    if update.error is not None:
                        raise EngineStopped(update.error)
                    found[update.request_id] = update.logprobs[0].top
        return found


async def admit(
    state: ServerState,
    body: GenerationFields,
    prompts: Sequence[Sequence[Request]],
    *,
    is_echo_only: bool = False,  # the client asked for no token
    num_reasoning: Callable[[], int] | None = None,
) -> Generation:
    """Returns the generation of all requests: a beam search, where the body asks for one."""
    if body.use_beam_search:
        return _beam_generation(
            state, body, prompts, is_echo_only=is_echo_only, num_reasoning=num_reasoning
        )
    return await start(state, prompts, is_echo_only=is_echo_only, num_reasoning=num_reasoning)


def _beam_generation(
    state: ServerState,
    body: GenerationFields,
    prompts: Sequence[Sequence[Request]],
    *,
    is_echo_only: bool,
    num_reasoning: Callable[[], int] | None,
) -> Generation:
    _, info, _ = state.loaded()
    asked = prompts[0][0].params
    assert asked.max_tokens is not None
    params = BeamSearchParams(
        beam_width=len(prompts[0]),
        max_tokens=asked.max_tokens,
        ignore_eos=asked.ignore_eos,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
    )
    params.check_logprobs(info.max_logprobs)
    return Generation(
        state,
        BeamUpdates(state, prompts, params),
        prompts,
        is_echo_only=is_echo_only,
        num_reasoning=num_reasoning,
    )


def _update_of(beam: Beam, sample: Request) -> Update:
    return Update(
        request_id=sample.request_id,
        tokens=beam.tokens,
        logprobs=beam.positions if sample.params.logprobs is not None else (),
        finish_reason="stop" if beam.has_ended else "length",
    )
