"""Where sequences are placed on a data axis of several ranks, and what ranks do not share."""

import pytest

from tests.engine.fake_device import (
    ids_of,
    pipeline_of,
    ranks_of,
    request,
    results_of,
    run_alone,
    scheduler_of,
    spans_of,
)


def test_requests_are_spread_over_the_ranks_ties_to_the_lowest():
    scheduler = scheduler_of(num_ranks=3)
    for name in "abcde":
        scheduler.add(request(name, [1]))
    plan = scheduler.plan_step()
    assert ranks_of(plan) == {"a": 0, "b": 1, "c": 2, "d": 0, "e": 1}
    assert sorted((sequence.rank, sequence.slot) for sequence in scheduler.running) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
    ]


def test_a_rank_with_fewer_pages_in_use_is_less_loaded():
    scheduler = scheduler_of(num_ranks=2)
    scheduler.add(request("long", range(12)))
    for name in "abc":
        scheduler.add(request(name, [1]))
    assert ranks_of(scheduler.plan_step()) == {"long": 0, "a": 1, "b": 1, "c": 0}


def test_ranks_may_be_empty_and_come_back_to_empty():
    pipeline = pipeline_of(num_ranks=3)
    pipeline.scheduler.add(request("a", [1, 2]))
    plan = pipeline.step()
    assert (ranks_of(plan), plan.num_sequences, plan.num_tokens) == ({"a": 0}, 1, 2)
    pipeline.drain()
    pipeline.scheduler.check_idle()


def test_the_bucket_follows_the_fullest_rank_of_each_count():
    scheduler = scheduler_of(num_ranks=2, max_step_rows=8)
    scheduler.add(request("long", range(12)))
    scheduler.add(request("scored", range(5), prompt_logprobs=0))
    scheduler.add(request("short", [1]))
    plan = scheduler.plan_step()
    assert ranks_of(plan) == {"long": 0, "scored": 1, "short": 1}
    assert (plan.num_tokens, plan.num_rows, plan.num_sequences) == (12, 6, 2)


def test_each_rank_has_a_token_budget_of_its_own():
    scheduler = scheduler_of(num_ranks=2, max_step_tokens=4)
    for name in "abc":
        scheduler.add(request(name, range(6)))
    assert spans_of(scheduler.plan_step()) == [("a", 0, 4), ("b", 0, 4)]
    plan = scheduler.plan_step()
    assert spans_of(plan) == [("a", 4, 2), ("c", 0, 2), ("b", 4, 2)]
    assert ranks_of(plan) == {"a": 0, "b": 1, "c": 0}


def test_decodes_of_all_ranks_come_first():
    scheduler = scheduler_of(num_ranks=2, max_step_tokens=4)
    scheduler.add(request("a", [1]))
    scheduler.add(request("b", [1]))
    scheduler.plan_step()
    for name in "cd":
        scheduler.add(request(name, range(9)))
    plan = scheduler.plan_step()
    assert spans_of(plan) == [("a", 1, 1), ("b", 1, 1), ("c", 0, 3), ("d", 0, 3)]
    assert (plan.num_decode, ranks_of(plan)) == (2, {"a": 0, "b": 1, "c": 0, "d": 1})


def with_prefix_on_rank_1(num_known=10, **options):
    """Returns a pipeline of 2 ranks: rank 1 runs "known", range(num_known); rank 0 one token."""
    pipeline = pipeline_of(num_ranks=2, caches=True, **options)
    pipeline.scheduler.add(request("filler", [7]))
    pipeline.scheduler.add(request("known", range(num_known)))
    assert ranks_of(pipeline.step()) == {"filler": 0, "known": 1}
    return pipeline


def test_a_shared_prefix_is_computed_where_it_is_known():
    pipeline = with_prefix_on_rank_1()
    pipeline.drain()
    pipeline.scheduler.add(request("again", [*range(10), 5]))
    plan = pipeline.step()
    assert (spans_of(plan), ranks_of(plan)) == ([("again", 8, 3)], {"again": 1})
    assert plan.grants[0].pages[:2] == (0, 1)


def test_a_prefix_is_worth_a_busier_rank():
    pipeline = with_prefix_on_rank_1()  # 4 of load: a sequence, 3 pages; rank 0 has 2
    pipeline.scheduler.add(request("again", [*range(8), 5]))
    plan = pipeline.step()
    assert (spans_of(plan)[-1], ranks_of(plan)["again"]) == (("again", 8, 1), 1)


def test_a_prefix_is_not_worth_a_much_busier_rank_and_is_then_known_on_both():
    pipeline = with_prefix_on_rank_1(num_known=14)
    ranks = []
    # A hit of one page outweighs 2 of load. Rank 1 has 3 more than rank 0 at first; in the end,
    # knowing the page too, it has less.
    for number in range(3):
        name = f"again {number}"
        pipeline.scheduler.add(request(name, [0, 1, 2, 3, 5]))
        ranks.append(ranks_of(pipeline.step())[name])
    assert ranks == [0, 0, 1]
    pipeline.drain()
    cached = [pipeline.updates[f"again {number}"][0].num_cached_tokens for number in range(3)]
    assert cached == [0, 4, 4]


def test_hits_are_counted_once_however_many_ranks_were_asked():
    pipeline = with_prefix_on_rank_1()
    pipeline.scheduler.add(request("again", [*range(8), 5]))
    pipeline.drain()
    totals = pipeline.scheduler.totals
    assert (totals.prefix_queries, totals.prefix_hits) == (1 + 10 + 9, 8)


def test_a_rank_without_a_slot_is_passed_over_whatever_it_knows():
    pipeline = with_prefix_on_rank_1(num_slots=1)
    pipeline.scheduler.abort("filler")
    pipeline.scheduler.add(request("again", range(10)))
    plan = pipeline.step()
    assert (spans_of(plan)[-1], ranks_of(plan)) == (("again", 0, 10), {"known": 1, "again": 0})


def test_a_rank_without_pages_is_passed_over():
    scheduler = scheduler_of(num_ranks=2, num_pages=8, max_step_tokens=40)
    scheduler.add(request("full", range(28)))
    scheduler.plan_step()
    for name in "abc":
        scheduler.add(request(name, range(6)))
    plan = scheduler.plan_step()
    assert ranks_of(plan) == {"full": 0, "a": 1, "b": 1, "c": 1}


def test_a_rank_that_knows_the_prefix_but_lacks_pages_is_passed_over():
    pipeline = with_prefix_on_rank_1(num_known=28, num_pages=10, max_step_tokens=40)
    pipeline.scheduler.add(request("again", [*range(20), *[5] * 11]))
    plan = pipeline.step()  # 3 pages beside the hits, and one kept: rank 1 has 3 free
    assert (spans_of(plan)[-1], ranks_of(plan)["again"]) == (("again", 0, 31), 0)


def test_a_head_too_large_for_every_rank_is_not_overtaken():
    scheduler = scheduler_of(num_ranks=2, num_pages=8, max_step_tokens=40)
    for name in "ab":
        scheduler.add(request(name, range(16)))
    scheduler.plan_step()
    scheduler.add(request("large", range(30)))
    scheduler.add(request("small", [1]))
    assert spans_of(scheduler.plan_step()) == [("a", 16, 1), ("b", 16, 1)]
    assert ids_of(scheduler.waiting) == ["large", "small"]
    scheduler.abort("b")
    plan = scheduler.plan_step()
    assert ranks_of(plan) == {"a": 0, "large": 1, "small": 0}


def test_upload_limits_are_each_ranks_own():
    scheduler = scheduler_of(num_ranks=2, max_wide_admissions=1)
    for name in "abc":
        scheduler.add(request(name, [1], min_tokens=1))
    assert ranks_of(scheduler.plan_step()) == {"a": 0, "b": 1}
    assert ids_of(scheduler.plan_step().admitted) == ["c"]


def test_one_queue_orders_all_ranks_by_priority():
    scheduler = scheduler_of(num_ranks=2, num_slots=1, policy="priority")
    for name, priority in (("a", 2), ("b", 1), ("c", 1), ("d", -3)):
        scheduler.add(request(name, [1], priority=priority, max_tokens=1))
    admitted = []
    while scheduler.has_work:
        plan = scheduler.plan_step()
        admitted.append(ids_of(plan.admitted))
        scheduler.commit(plan, results_of(plan, 5))
    assert admitted == [["d", "b"], ["c", "a"]]


def with_full_rank_0(**options):
    """Returns a pipeline of 2 ranks: "a" and "b" are about to fill rank 0, "c" sits on rank 1."""
    limits = {"num_pages": 4, "page_size": 2, "max_model_len": 8, **options}
    pipeline = pipeline_of(num_ranks=2, **limits)
    pipeline.scheduler.add(request("a", [1, 2, 3], max_tokens=5))
    pipeline.scheduler.add(request("c", [1, 2, 3, 4], max_tokens=4))
    pipeline.scheduler.add(request("b", [1], max_tokens=6))
    assert ranks_of(pipeline.step()) == {"a": 0, "c": 1, "b": 0}
    return pipeline


def test_a_preempted_sequence_goes_on_at_another_rank():
    pipeline = with_full_rank_0()
    pipeline.scheduler.abort("c")
    ranks = []
    pipeline.check = lambda plan: ranks.append(ranks_of(plan).get("b")) if plan else None
    plans = pipeline.drain()
    assert [ids_of(plan.preempted) for plan in plans if plan.preempted] == [["b"]]
    assert [ids_of(plan.admitted) for plan in plans if plan.admitted] == [["b"]]
    seen = [rank for rank in ranks if rank is not None]
    assert seen == sorted(seen) and set(seen) == {0, 1}
    assert pipeline.outputs_of("a") == run_alone(request("a", [1, 2, 3], max_tokens=5), 8)[0]
    assert pipeline.outputs_of("b") == run_alone(request("b", [1], max_tokens=6), 8)[0]
    pipeline.scheduler.check_idle()


def test_preemption_takes_pages_of_its_own_rank_only():
    limits = {"num_pages": 4, "page_size": 2, "max_model_len": 8, "policy": "priority"}
    pipeline = pipeline_of(num_ranks=2, **limits)
    requests = [
        request("last of all", [1] * 6, max_tokens=2, priority=9),
        request("a", [1, 2, 3], max_tokens=5),
        request("b", [1], max_tokens=6),
    ]
    pipeline.scheduler.add(requests[0])
    pipeline.step()
    pipeline.scheduler.add(requests[1])
    pipeline.scheduler.add(requests[2])
    assert ranks_of(pipeline.step()) == {"last of all": 0, "a": 1, "b": 1}
    plans = pipeline.drain()
    assert {name for plan in plans for name in ids_of(plan.preempted)} == {"b"}
    for each in requests:
        assert pipeline.outputs_of(each.request_id) == run_alone(each, 8)[0]


def test_a_preempted_prefill_can_move_within_the_step_that_preempts_it():
    limits = {"num_pages": 5, "page_size": 2, "max_step_tokens": 3, "max_model_len": 10}
    scheduler = scheduler_of(num_ranks=2, **limits)
    for name in "ab":
        scheduler.add(request(name, [1], max_tokens=9))
    scheduler.plan_step()
    scheduler.add(request("c", range(7), max_tokens=1))
    plan = scheduler.plan_step()
    assert ranks_of(plan) == {"a": 0, "b": 1, "c": 0}
    scheduler.abort("b")
    while not plan.preempted:
        plan = scheduler.plan_step()
    assert (ids_of(plan.preempted), ids_of(plan.admitted)) == (["c"], ["c"])
    assert (spans_of(plan)[-1], ranks_of(plan)["c"]) == (("c", 0, 3), 1)
    assert [grant.pages for grant in plan.grants if grant.sequence.rank == 1] == [(1, 2)]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_aborting_everything_leaves_every_rank_idle(num_ranks):
    scheduler = scheduler_of(num_ranks=num_ranks)
    for name in "abcdefg":
        scheduler.add(request(name, range(6)))
    plans = [scheduler.plan_step(), scheduler.plan_step()]
    with pytest.raises(AssertionError):
        scheduler.check_idle()
    for name in "abcdefg":
        scheduler.abort(name)
    scheduler.check_idle()
    assert [scheduler.commit(plan, results_of(plan, 9)) for plan in plans] == [[], []]


def test_a_context_that_does_not_fit_one_of_the_pools_is_an_error_at_start():
    with pytest.raises(AssertionError, match=r"pages_per_sequence=8 pool\.num_pages=7"):
        scheduler_of(num_ranks=2, num_pages=7, max_model_len=32)
