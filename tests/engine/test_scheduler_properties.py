"""Any mix of requests, aborts and steps, on small pools, against each request run alone."""

import dataclasses

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.scheduler import Scheduler
from tests.engine.fake_device import (
    EOS,
    VOCABULARY,
    FakeDevice,
    Pipeline,
    logprobs_of,
    run_alone,
)

tokens = st.integers(0, VOCABULARY - 1)
shared_start = st.lists(tokens, min_size=16, max_size=16)
sampling = st.builds(
    dict,
    max_tokens=st.sampled_from([None, 8, 2, 4, 20]),
    min_tokens=st.sampled_from([0, 0, 0, 2]),
    ignore_eos=st.sampled_from([True, True, False]),
    stop_token_ids=st.sampled_from([(), (), (), (4,)]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([None, None, {1: 1.0}]),
    logprobs=st.sampled_from([None, 0]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
)


@st.composite
def limits(draw):
    """Draws the sizes of a scheduler on which the longest sequence fits, mostly barely."""
    page_size = draw(st.integers(1, 4))
    pages_per_sequence = draw(st.integers(2, 8))
    max_model_len = pages_per_sequence * page_size - draw(st.integers(0, page_size - 1))
    num_slots = draw(st.sampled_from([4, 3, 2, 1]))
    return {
        "num_pages": pages_per_sequence + draw(st.integers(0, 3)),
        "page_size": page_size,
        "num_slots": num_slots,
        "max_step_tokens": draw(st.sampled_from([4, 8, 16, 3, 2, 1])),
        "max_model_len": max_model_len,
        "max_waiting": 8,
        "max_page_grants": pages_per_sequence + draw(st.integers(0, 2)),
        "max_history_tokens": max_model_len + draw(st.integers(0, 8)),
        "max_wide_admissions": draw(st.integers(1, 2)),
        "max_step_rows": draw(st.integers(1, num_slots + 2)),
        "policy": draw(st.sampled_from(["priority", "fcfs"])),
    }


def use_of(plan, rank):
    """Returns what a plan, or None, takes of each limit of a rank."""
    spans = () if plan is None else [span for span in plan.spans if span.sequence.rank == rank]
    grants = () if plan is None else [grant for grant in plan.grants if grant[0].rank == rank]
    admitted = () if plan is None else [other for other in plan.admitted if other.rank == rank]
    return {
        "num_slots": len(spans),
        "max_step_tokens": sum(span.count for span in spans),
        "max_step_rows": sum(span.num_rows for span in spans),
        "max_page_grants": sum(len(grant.pages) for grant in grants),
        "max_history_tokens": sum(sequence.num_history for sequence in admitted),
        "max_wide_admissions": sum(sequence.is_wide for sequence in admitted),
    }


class SchedulerMachine(RuleBasedStateMachine):
    """Drives a scheduler and a device that remembers what each page holds."""

    def __init__(self, num_ranks):
        super().__init__()
        self.num_ranks = num_ranks

    @initialize(
        limits=limits(), caches=st.booleans(), start=st.lists(tokens, min_size=16, max_size=16)
    )
    def build(self, limits, caches, start):
        self.limits = dict(limits)
        num_pages, page_size = limits.pop("num_pages"), limits["page_size"]
        self.pools = [PagePool(num_pages) for _ in range(self.num_ranks)]
        prefix_caches = [PrefixCache(page_size, enabled=caches) for _ in range(self.num_ranks)]
        scheduler = Scheduler(self.pools, prefix_caches, eos_tokens=(EOS,), **limits)
        sizes = {"num_pages": num_pages, "page_size": page_size, "num_slots": limits["num_slots"]}
        device = FakeDevice(num_ranks=self.num_ranks, **sizes)
        self.pipeline = Pipeline(scheduler, device, self._check_plan)
        self.num_moved = 0  # admissions of sequences that were preempted on another rank
        self.last_rank = {}  # of each sequence that has run
        self.start = start  # shared by prompts, so that prefixes are hit
        self.requests = {}
        self.aborted = set()

    @property
    def scheduler(self):
        return self.pipeline.scheduler

    @precondition(lambda self: self.scheduler.num_waiting < self.limits["max_waiting"])
    @rule(
        num_shared=st.integers(0, 16),
        rest=st.lists(tokens, min_size=1, max_size=3),
        params=sampling,
        priority=st.sampled_from([1, 0, 2]),
        salt=st.sampled_from(["", "", "", "salt"]),
        copies=st.integers(1, 4),
    )
    def submit(self, num_shared, rest, params, priority, salt, copies):
        prompt = [*self.start[:num_shared], *rest][: self.limits["max_model_len"] - 1]
        for _ in range(min(copies, self.limits["max_waiting"] - self.scheduler.num_waiting)):
            request = Request(
                request_id=f"request {len(self.requests)}",
                prompt_tokens=tuple(prompt),
                params=SamplingParams(**params),
                priority=priority,
                cache_salt=salt,
            )
            self.requests[request.request_id] = request
            self.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        recent = list(self.requests)[-8:]
        request_id = data.draw(st.sampled_from(recent))
        if not self._is_finished(request_id):
            self.aborted.add(request_id)
        self.scheduler.abort(request_id)

    @rule(count=st.sampled_from([4, 1, 2, 8]))
    def step(self, count):
        for _ in range(count):
            self.pipeline.step()
            self._check_memory()

    @invariant()
    def pages_and_slots_are_conserved(self):
        if not hasattr(self, "pools"):
            return
        for rank, pool in enumerate(self.pools):
            pool.check()
            running = [sequence for sequence in self.scheduler.running if sequence.rank == rank]
            held = [page for sequence in running for page in sequence.pages]
            assert len(set(held)) == pool.num_pages - pool.num_free
            assert all(pool.num_holders_of(page) == held.count(page) for page in held)
            slots = {sequence.slot for sequence in running}
            assert len(slots) == len(running) and slots <= set(range(self.limits["num_slots"]))
        waiting = self.scheduler.waiting
        assert not any(sequence.pages for sequence in waiting)
        assert {(sequence.rank, sequence.slot) for sequence in waiting} <= {(None, None)}

    def teardown(self):
        if not hasattr(self, "pools"):
            return
        num_steps = 0
        while self.scheduler.has_work or self.pipeline.in_flight:
            self.step(1)
            assert (num_steps := num_steps + 1) < 2000, f"{self.scheduler.num_running=}"
        self.scheduler.check_idle()
        for request_id, request in self.requests.items():
            self._check_updates(request_id, request)

    def _is_finished(self, request_id):
        updates = self.pipeline.updates.get(request_id, ())
        return any(update.finish_reason is not None for update in updates)

    def _check_plan(self, plan):
        uses = [use_of(plan, rank) for rank in range(self.num_ranks)]
        assert all(use[name] <= self.limits[name] for use in uses for name in use)
        short = set()  # ranks that preempt
        if plan is not None:
            self._check_spans(plan)
            assert plan.num_tokens == max(use["max_step_tokens"] for use in uses)
            assert plan.num_rows == max(use["max_step_rows"] for use in uses)
            assert plan.num_sequences == max(use["num_slots"] for use in uses)
            short = {self.last_rank[sequence] for sequence in plan.preempted}
            self.num_moved += sum(
                self.last_rank.get(sequence, sequence.rank) != sequence.rank
                for sequence in plan.admitted
            )
        for rank, use in enumerate(uses):
            assert rank in short or not self._has_room(rank, use), f"{rank=} could admit more"
        self.last_rank.update((sequence, sequence.rank) for sequence in self.scheduler.running)

    def _check_spans(self, plan):
        spans = plan.spans
        assert all(span.count == 1 and span.samples for span in spans[: plan.num_decode])
        assert not any(span.count == 1 and span.samples for span in spans[plan.num_decode :])
        computing = {span.sequence for span in spans}
        assert len(computing) == len(spans)
        assert computing.issuperset(plan.admitted)
        moved = computing.intersection(plan.preempted)
        assert moved <= set(plan.admitted)
        assert all(self.last_rank[sequence] != sequence.rank for sequence in moved)

    def _has_room(self, rank, use):
        """Returns whether a rank surely could have admitted the first that waits, and more."""
        if not self.scheduler.waiting or self.scheduler.waiting[0].num_in_flight:
            return False
        sequence = self.scheduler.waiting[0]
        num_pages = -(-len(sequence.tokens) // self.limits["page_size"])
        needs = {
            "max_step_tokens": 1,
            "max_step_rows": 1,
            "max_page_grants": num_pages,
            "max_history_tokens": sequence.num_history,
            "max_wide_admissions": int(sequence.is_wide),
        }
        num_running = sum(other.rank == rank for other in self.scheduler.running)
        return (
            num_running < self.limits["num_slots"]
            and self.pools[rank].num_free > num_pages  # one is kept for those that run
            and all(use[name] + need <= self.limits[name] for name, need in needs.items())
        )

    def _check_memory(self):
        """Each running sequence sees its own tokens at every position it has computed."""
        for sequence in self.scheduler.running:
            end = min(sequence.num_computed, len(sequence.tokens))
            assert self.pipeline.device.read(sequence, end) == sequence.tokens[:end]

    def _check_updates(self, request_id, request):
        outputs, reason, stop_token = run_alone(request, self.limits["max_model_len"])
        updates = self.pipeline.updates.get(request_id, [])
        seen = self.pipeline.outputs_of(request_id)
        if request_id in self.aborted:
            assert seen == outputs[: len(seen)] and not self._is_finished(request_id)
        else:
            last = updates[-1]
            assert (seen, last.finish_reason, last.stop_token) == (outputs, reason, stop_token)
        assert all(update.finish_reason is None for update in updates[:-1])
        if updates:
            self._check_logprobs(request, updates, [*request.prompt_tokens, *seen])

    def _check_logprobs(self, request, updates, context):
        expected = [logprobs_of(context[:end], context[end]) for end in range(1, len(context))]
        num_prompt = len(request.prompt_tokens)
        prompt_logprobs = (None, *expected[: num_prompt - 1])
        wants_prompt = request.params.prompt_logprobs is not None
        assert updates[0].prompt_logprobs == (prompt_logprobs if wants_prompt else None)
        assert all(update.prompt_logprobs is None for update in updates[1:])
        logprobs = [entry for update in updates for entry in update.logprobs]
        assert logprobs == (expected[num_prompt - 1 :] if request.params.logprobs == 0 else [])
        cached = updates[0].num_cached_tokens
        assert cached % self.limits["page_size"] == 0 and cached < num_prompt
        assert not cached or not wants_prompt


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_any_history_of_requests_gives_each_what_it_would_get_alone(num_ranks):
    options = settings(max_examples=120, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(lambda: SchedulerMachine(num_ranks), settings=options)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_preemptions_hits_and_moves_do_happen_on_pools_this_small(num_ranks):
    machine = SchedulerMachine(num_ranks)
    sizes = {"num_pages": 7, "page_size": 2, "num_slots": 4, "max_step_tokens": 6}
    more = {"max_model_len": 12, "max_waiting": 72, "max_page_grants": 6, "policy": "priority"}
    rest = {"max_history_tokens": 12, "max_wide_admissions": 1, "max_step_rows": 4}
    machine.build({**sizes, **more, **rest}, True, [3, 1, 4, 1, 5])
    params = dataclasses.asdict(SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0))
    for number in range(24 * num_ranks):
        machine.submit(number % 6, [number % 5 + 1], params, number % 3, "", 1)
    machine.teardown()
    totals = machine.scheduler.totals
    assert totals.num_preemptions > 10 and totals.prefix_hits > 10
    assert (machine.num_moved > 5) == (num_ranks > 1)
    assert totals.num_finished == {"stop": 0, "length": 24 * num_ranks, "abort": 0}
