"""A device without numbers: paged memory that holds tokens, and a model that is a formula.

The next token depends on every token and position before it, read through the page table, so a
page that is lost, stale, shared wrongly or written too late changes what is generated.
"""

from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.request import Request, SamplingParams, TokenLogprobs
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.sequence import SpanResult

VOCABULARY = 13
EOS = 0


def next_token(context):
    """Returns the model's next token after `context`."""
    return (sum((place + 3) * token for place, token in enumerate(context)) + 5) % VOCABULARY


def logprobs_of(context, token):
    """Returns the made-up logprobs of `token` after `context`."""
    logprob = -0.25 * (sum(context) + token) - len(context)
    return TokenLogprobs(token=token, logprob=logprob, rank=1, top=())


def run_alone(request, max_model_len):
    """Returns (outputs, finish reason, stop token) of a request without batch, pages or steps."""
    params = request.params
    tokens, outputs = list(request.prompt_tokens), []
    while True:
        outputs.append(token := next_token(tokens))
        tokens.append(token)
        if len(outputs) >= params.min_tokens:
            if token == EOS and not params.ignore_eos:
                return outputs, "stop", None
            if token in params.stop_token_ids:
                return outputs, "stop", token
        if len(outputs) == params.max_tokens or len(tokens) == max_model_len:
            return outputs, "length", None


class FakeDevice:
    """Runs plans in order, each sequence's part on its rank."""

    def __init__(self, *, num_ranks=1, **sizes):
        self.ranks = [FakeRank(**sizes) for _ in range(num_ranks)]

    def run(self, plan):
        """Returns the results of `plan.spans`."""
        for sequence in plan.admitted:
            self.ranks[sequence.rank].page_table[sequence.slot] = {}
        for sequence, first_index, pages in plan.grants:
            for index, page in enumerate(pages, first_index):
                self.ranks[sequence.rank].page_table[sequence.slot][index] = page
        # Last to first: nothing promises that a span sees what another of its step wrote.
        spans = reversed(plan.spans)
        return [self.ranks[span.sequence.rank].run_span(span) for span in spans][::-1]

    def read(self, sequence, end):
        """Returns the tokens whose keys a running sequence sees at positions [0, end)."""
        return self.ranks[sequence.rank].read(sequence.slot, end)


class FakeRank:
    """One rank's memory. It starts as junk and is never cleared."""

    def __init__(self, *, num_pages, page_size, num_slots):
        self.page_size = page_size
        self.memory = [999] * (num_pages * page_size)
        self.page_table = [{} for _ in range(num_slots)]
        self.last_token = [777] * num_slots

    def read(self, slot, end):
        """Returns the tokens whose keys a slot sees at positions [0, end)."""
        return [self.memory[self._address(slot, position)] for position in range(end)]

    def run_span(self, span):
        """Writes a span's tokens; returns its result."""
        sequence, slot, end = span.sequence, span.sequence.slot, span.start + span.count
        tokens = sequence.tokens[span.start : end]
        if span.takes_device_token:
            assert span.count == 1 and not tokens
            tokens = [self.last_token[slot]]
        assert len(tokens) == span.count
        for position, token in enumerate(tokens, span.start):
            self.memory[self._address(slot, position)] = token
        context = self.read(slot, end)
        scored = tuple(
            logprobs_of(context[: place + 1], sequence.tokens[place + 1])
            for place in range(end - span.num_rows, end - span.samples)
        )
        if not span.samples:
            return SpanResult(None, prompt_logprobs=scored)
        self.last_token[slot] = token = next_token(context)
        return SpanResult(token, logprobs_of(context, token), scored)

    def _address(self, slot, position):
        index, offset = divmod(position, self.page_size)
        return self.page_table[slot][index] * self.page_size + offset


class Pipeline:
    """A scheduler and a device with one step in flight, as in the engine. Keeps all updates.

    `check` sees each plan, or None, before anything else happens.
    """

    def __init__(self, scheduler, device, check=lambda plan: None):
        self.scheduler = scheduler
        self.device = device
        self.check = check
        self.in_flight = None
        self.updates = {}

    def step(self):
        """Plans and runs a step, then commits the one before; returns the plan."""
        plan = self.scheduler.plan_step()
        self.check(plan)
        assert plan or self.in_flight or not self.scheduler.has_work, "nothing will ever happen"
        results = None if plan is None else self.device.run(plan)
        if self.in_flight is not None:
            for update in self.scheduler.commit(*self.in_flight):
                self.updates.setdefault(update.request_id, []).append(update)
        self.in_flight = None if plan is None else (plan, results)
        return plan

    def drain(self, max_steps=2000):
        """Steps until nothing is left to do; returns the plans."""
        plans = []
        while self.scheduler.has_work or self.in_flight:
            plans.append(self.step())
            assert len(plans) < max_steps, f"{self.scheduler.num_running=} after {max_steps=}"
        return [plan for plan in plans if plan is not None]

    def outputs_of(self, request_id):
        """Returns the tokens a client has seen."""
        return [token for update in self.updates.get(request_id, ()) for token in update.tokens]


def scheduler_of(*, num_ranks=1, num_pages=16, page_size=4, caches=False, **limits):
    """Returns a scheduler of roomy limits, but for those given; pages and slots are each rank's."""
    defaults = {
        "num_slots": 4,
        "max_step_tokens": 16,
        "max_model_len": 32,
        "max_waiting": 8,
        "eos_tokens": (EOS,),
        "max_page_grants": 64,
        "max_history_tokens": 64,
        "max_wide_admissions": 2,
    }
    pools = [PagePool(num_pages) for _ in range(num_ranks)]
    prefix_caches = [PrefixCache(page_size, enabled=caches) for _ in range(num_ranks)]
    return Scheduler(pools, prefix_caches, page_size=page_size, **{**defaults, **limits})


def pipeline_of(*, num_ranks=1, num_pages=16, page_size=4, num_slots=4, **options):
    """Returns a scheduler with a device that runs its plans."""
    sizes = {
        "num_ranks": num_ranks,
        "num_pages": num_pages,
        "page_size": page_size,
        "num_slots": num_slots,
    }
    return Pipeline(scheduler_of(**sizes, **options), FakeDevice(**sizes))


def request(request_id, prompt, *, priority=0, salt="", **params):
    """Returns a request for 4 tokens that EOS does not end, but for what is given."""
    params = {"max_tokens": 4, "ignore_eos": True, **params}
    return Request(
        request_id=request_id,
        prompt_tokens=tuple(prompt),
        params=SamplingParams(**params),
        priority=priority,
        cache_salt=salt,
    )


def spans_of(plan):
    """Returns (request id, start, count) of each span."""
    return [(span.sequence.request.request_id, span.start, span.count) for span in plan.spans]


def results_of(plan, token):
    """Returns results with `token` for every span that samples."""
    return [SpanResult(token if span.samples else None) for span in plan.spans]


def ranks_of(plan):
    """Returns the rank of each span's sequence, by request id."""
    return {span.sequence.request.request_id: span.sequence.rank for span in plan.spans}


def ids_of(sequences):
    """Returns the request ids of sequences."""
    return [sequence.request.request_id for sequence in sequences]
