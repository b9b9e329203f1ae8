import pytest

from tests.engine.fake_device import (
    ids_of,
    pipeline_of,
    request,
    results_of,
    run_alone,
    scheduler_of,
    spans_of,
)


def full_pool(policy, priorities):
    """Returns a pipeline whose three sequences fill all pages and are about to need more."""
    pipeline = pipeline_of(num_pages=6, page_size=2, max_model_len=12, policy=policy)
    for request_id, priority in zip("abc", priorities, strict=True):
        # A reserve keeps the last page from admissions, so each prompt ends inside a page.
        pipeline.scheduler.add(request(request_id, [1, 2, 3], priority=priority, max_tokens=6))
        pipeline.step()
    return pipeline


@pytest.mark.parametrize(
    ("policy", "priorities", "victims"),
    [
        ("fcfs", (3, 2, 1), ["b", "c"]),
        ("priority", (1, 1, 1), ["b", "c"]),
        ("priority", (3, 2, 1), ["a", "b"]),
        ("priority", (1, 3, 2), ["b", "c"]),
    ],
)
def test_the_last_in_order_are_preempted_and_still_answer(policy, priorities, victims):
    pipeline = full_pool(policy, priorities)
    plans = pipeline.drain()
    preempted = {name for plan in plans for name in ids_of(plan.preempted)}
    assert preempted and preempted <= set(victims)
    for name in "abc":
        assert pipeline.outputs_of(name) == run_alone(request(name, [1, 2, 3], max_tokens=6), 12)[0]
    pipeline.scheduler.check_idle()


def preempted_with_tokens_in_flight():
    """Returns a scheduler that preempted b for a, c waiting, and its uncommitted plans."""
    scheduler = scheduler_of(num_pages=4, page_size=2, max_model_len=8)
    scheduler.add(request("a", [1, 2, 3], max_tokens=5))
    plans = [scheduler.plan_step()]
    scheduler.add(request("b", [1], max_tokens=3))
    plans.append(scheduler.plan_step())
    scheduler.add(request("c", [1], max_tokens=1))
    plans += [scheduler.plan_step() for _ in range(3)]
    return scheduler, plans


def test_a_preempted_sequence_waits_first_and_is_not_admitted_in_the_same_step():
    scheduler, plans = preempted_with_tokens_in_flight()
    assert [spans_of(plan) for plan in plans[1:]] == [
        [("a", 3, 1), ("b", 0, 1)],
        [("a", 4, 1), ("b", 1, 1)],
        [("a", 5, 1)],  # b needs a page, and waits rather than preempt itself
        [("a", 6, 1)],
    ]
    assert ids_of(plans[-1].preempted) == ["b"]
    assert ids_of(scheduler.waiting) == ["b", "c"]
    assert scheduler.totals.num_preemptions == 1


def test_a_preempted_sequence_waits_for_its_tokens_in_flight_and_recomputes_them():
    scheduler, plans = preempted_with_tokens_in_flight()
    scheduler.abort("a")  # slots and pages are free now, but b's tokens are not known
    assert scheduler.plan_step() is None
    updates = [scheduler.commit(plan, results_of(plan, 9)) for plan in plans]
    assert [len(update) for update in updates] == [0, 1, 1, 0, 0]
    plan = scheduler.plan_step()
    assert spans_of(plan) == [("c", 0, 1), ("b", 0, 3)]
    assert (ids_of(plan.admitted), plan.num_decode) == (["b", "c"], 1)
    assert [update.tokens for update in scheduler.commit(plan, results_of(plan, 8))] == [(8,)] * 2


def test_a_prefill_can_preempt_a_decode_that_the_plan_already_holds():
    limits = {"num_pages": 5, "page_size": 2, "max_step_tokens": 4, "max_model_len": 10}
    scheduler = scheduler_of(policy="priority", **limits)
    scheduler.add(request("later", [1], priority=1))
    scheduler.plan_step()
    scheduler.add(request("first", range(9), priority=0))
    plans = [scheduler.plan_step() for _ in range(3)]
    assert [spans_of(plan) for plan in plans] == [
        [("later", 1, 1), ("first", 0, 3)],
        [("later", 2, 1), ("first", 3, 3)],
        [("first", 6, 3)],  # the decode had its span, until its pages were needed
    ]
    assert ids_of(plans[2].preempted) == ["later"]
    assert (plans[2].num_tokens, plans[2].num_rows) == (3, 1)


def test_nobody_is_admitted_in_a_step_that_preempts():
    limits = {"num_pages": 5, "page_size": 2, "num_slots": 2, "max_model_len": 10}
    scheduler = scheduler_of(policy="priority", **limits)
    scheduler.add(request("later", range(5), priority=2, max_tokens=5))
    scheduler.plan_step()
    scheduler.add(request("first", [1, 2], max_tokens=5))
    plans = [scheduler.plan_step() for _ in range(3)]
    scheduler.add(request("between", [1], priority=1))
    plans += [scheduler.plan_step() for _ in range(2)]
    assert [ids_of(plan.preempted) for plan in plans] == [[], [], [], ["later"], []]
    assert spans_of(plans[3]) == [("first", 4, 1)]
    assert spans_of(plans[4]) == [("first", 5, 1), ("between", 0, 1)]


def test_a_preempted_sequence_can_end_while_it_waits():
    scheduler, plans = preempted_with_tokens_in_flight()
    scheduler.waiting[0].end_tokens = frozenset({9})
    updates = [scheduler.commit(plan, results_of(plan, 9)) for plan in plans]
    assert [update.finish_reason for update in updates[1]] == [None, "stop"]
    assert ids_of(scheduler.waiting) == ["c"]


def test_aborting_frees_everything_in_every_state():
    scheduler, plans = preempted_with_tokens_in_flight()
    scheduler.add(request("new", [1]))
    for name in ("a", "b", "c", "new", "a", "unknown"):
        scheduler.abort(name)
    scheduler.check_idle()
    assert scheduler.totals.num_finished["abort"] == 4
    assert [scheduler.commit(plan, results_of(plan, 9)) for plan in plans] == [[]] * 5
    assert scheduler.plan_step() is None


def test_pages_hit_again_after_preemption_are_not_reported_as_cached():
    limits = {"num_pages": 6, "page_size": 2, "max_step_tokens": 2, "max_model_len": 12}
    pipeline = pipeline_of(caches=True, **limits)
    pipeline.scheduler.add(request("first", [9], max_tokens=8))
    pipeline.step()
    pipeline.scheduler.add(request("later", range(11), max_tokens=1))
    plans = pipeline.drain()
    assert [ids_of(plan.preempted) for plan in plans if plan.preempted] == [["later"]]
    starts = [span[1] for plan in plans if plan.admitted for span in spans_of(plan)[-1:]]
    assert starts == [0, 4]
    assert pipeline.updates["later"][0].num_cached_tokens == 0
    totals = pipeline.scheduler.totals
    assert (totals.prefix_queries, totals.prefix_hits) == (12, 0)
