"""Beam search offline: from outputs to candidates, and from beams to what `LLM` returns.

Host only: imports no jax.
"""

from __future__ import annotations

from jaxserve.beam_search import Beam, BeamSearch, BeamSearchParams, Candidates
from jaxserve.outputs import BeamSearchOutput, BeamSearchSequence, Logprob, RequestOutput
from jaxserve.text.tokenizer import Tokenizer


def candidates_of(output: RequestOutput) -> Candidates:
    """Returns the likeliest tokens of an output of one token, likeliest first."""
    positions = output.outputs[0].logprobs
    assert positions
    return [(token, entry.logprob) for token, entry in positions[0].items()]


def beam_output(
    search: BeamSearch, params: BeamSearchParams, tokenizer: Tokenizer
) -> BeamSearchOutput:
    """Returns the result of a search that is over."""
    return BeamSearchOutput(
        sequences=[
            _sequence(beam, search.prompt_tokens, params, tokenizer) for beam in search.best()
        ]
    )


def _sequence(
    beam: Beam, prompt_tokens: tuple[int, ...], params: BeamSearchParams, tokenizer: Tokenizer
) -> BeamSearchSequence:
    hides_end = beam.has_ended and not params.include_stop_str_in_output
    generated = beam.tokens[:-1] if hides_end else beam.tokens
    tokens = [*prompt_tokens, *generated]
    # A stop that is to be seen is a special token, which would be skipped.
    skips = params.skip_special_tokens and not (beam.has_ended and not hides_end)
    return BeamSearchSequence(
        tokens=tokens,
        text=tokenizer.decode(tokens, skip_special_tokens=skips),
        cum_logprob=beam.cumulative_logprob,
        logprobs=[
            {
                token: Logprob(
                    logprob=logprob, rank=rank, decoded_token=tokenizer.token_text(token)
                )
                for rank, (token, logprob) in enumerate(position.top, 1)
            }
            for position in beam.positions
        ],
        finish_reason="stop" if beam.has_ended else "length",
    )
