import pytest

from jaxserve.errors import PromptTooLong, QueueFull, RequestError
from tests.engine.fake_device import (
    EOS,
    ids_of,
    logprobs_of,
    next_token,
    pipeline_of,
    request,
    results_of,
    run_alone,
    scheduler_of,
    spans_of,
)


def test_a_long_prompt_is_cut_into_chunks_by_the_token_budget():
    scheduler = scheduler_of(max_step_tokens=4)
    scheduler.add(request("a", range(10)))
    plans = [scheduler.plan_step() for _ in range(3)]
    assert [spans_of(plan) for plan in plans] == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 2)]]
    assert [plan.spans[0].samples for plan in plans] == [False, False, True]
    assert [plan.num_rows for plan in plans] == [0, 0, 1]


def test_pages_are_granted_as_chunks_need_them():
    scheduler = scheduler_of(max_step_tokens=6)
    scheduler.add(request("a", range(10)))
    first, second = scheduler.plan_step(), scheduler.plan_step()
    assert [(first_index, pages) for _, first_index, pages in first.grants] == [(0, (0, 1))]
    assert [(first_index, pages) for _, first_index, pages in second.grants] == [(2, (2,))]
    assert (ids_of(first.admitted), ids_of(second.admitted)) == (["a"], [])


def test_decodes_come_before_prefills_and_take_their_token_on_the_device():
    scheduler = scheduler_of(max_step_tokens=4)
    scheduler.add(request("long", range(9)))
    scheduler.add(request("short", [1]))
    scheduler.plan_step()
    scheduler.plan_step()
    last_of_prompt = scheduler.plan_step()
    assert spans_of(last_of_prompt) == [("long", 8, 1), ("short", 0, 1)]
    scheduler.add(request("late", range(9)))
    plan = scheduler.plan_step()
    assert spans_of(plan) == [("long", 9, 1), ("short", 1, 1), ("late", 0, 2)]
    assert plan.num_decode == 2
    assert [span.takes_device_token for span in plan.spans] == [True, True, False]


def test_a_committed_token_is_not_taken_from_the_device():
    scheduler = scheduler_of()
    scheduler.add(request("a", [1, 2]))
    plan = scheduler.plan_step()
    scheduler.commit(plan, results_of(plan, 9))
    (span,) = scheduler.plan_step().spans
    assert (span.start, span.count, span.takes_device_token) == (2, 1, False)


def test_a_sequence_whose_end_is_known_is_not_planned_again():
    scheduler = scheduler_of(max_model_len=8)
    scheduler.add(request("two", [1], max_tokens=2))
    scheduler.add(request("full", range(6), max_tokens=None))
    assert [spans_of(scheduler.plan_step()) for _ in range(2)] == [
        [("two", 0, 1), ("full", 0, 6)],
        [("two", 1, 1), ("full", 6, 1)],
    ]
    assert scheduler.plan_step() is None
    assert scheduler.has_work


def test_the_token_that_ran_past_the_end_is_dropped():
    scheduler = scheduler_of()
    scheduler.add(request("a", [1, 2], ignore_eos=False, max_tokens=9))
    first, overrun = scheduler.plan_step(), scheduler.plan_step()
    (update,) = scheduler.commit(first, results_of(first, EOS))
    assert (update.tokens, update.finish_reason, update.stop_token) == ((EOS,), "stop", None)
    scheduler.check_idle()
    assert scheduler.commit(overrun, results_of(overrun, 5)) == []
    assert scheduler.totals.generation_tokens == 1


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_token"),
    [
        ({"ignore_eos": False, "stop_token_ids": (EOS,)}, [EOS], "stop", None),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, [EOS], "stop", EOS),
        ({"stop_token_ids": (7,)}, [5, 7], "stop", 7),
        ({"stop_token_ids": (7,), "min_tokens": 2}, [7, 7], "stop", 7),
        ({"ignore_eos": False, "min_tokens": 3}, [EOS, EOS, EOS], "stop", None),
        ({"stop_token_ids": (7,), "max_tokens": 1}, [7], "stop", 7),
        ({"ignore_eos": True}, [EOS, EOS, EOS, EOS], "length", None),
    ],
)
def test_a_sequence_ends_for_the_first_reason_that_holds(params, tokens, reason, stop_token):
    scheduler = scheduler_of()
    scheduler.add(request("a", [1], **params))
    for token in tokens:
        plan = scheduler.plan_step()
        (update,) = scheduler.commit(plan, results_of(plan, token))
        assert update.tokens == (token,)
        assert (update.finish_reason is None) == scheduler.has_work
    assert (update.finish_reason, update.stop_token) == (reason, stop_token)
    assert scheduler.totals.num_finished[reason] == 1
    scheduler.check_idle()


def test_equal_prompts_share_full_pages_once_the_first_is_dispatched():
    pipeline = pipeline_of(caches=True, max_step_tokens=32)
    pipeline.scheduler.add(request("a", range(10)))
    pipeline.scheduler.add(request("same step", range(10)))
    pipeline.step()
    pipeline.scheduler.add(request("b", [*range(8), 5, 5]))
    plan = pipeline.step()
    assert spans_of(plan)[-1] == ("b", 8, 2)
    assert plan.grants[-1][1:] == (0, (0, 1, 6))
    pipeline.drain()
    assert pipeline.updates["b"][0].num_cached_tokens == 8
    assert pipeline.updates["same step"][0].num_cached_tokens == 0
    assert {update.num_cached_tokens for update in pipeline.updates["b"][1:]} == {0}
    totals = pipeline.scheduler.totals
    assert (totals.prefix_queries, totals.prefix_hits) == (30, 8)


def test_a_whole_prompt_that_is_known_still_computes_its_last_page():
    pipeline = pipeline_of(caches=True)
    pipeline.scheduler.add(request("a", range(8)))
    pipeline.drain()
    pipeline.scheduler.add(request("b", range(8)))
    assert spans_of(pipeline.step()) == [("b", 4, 4)]


def test_generated_pages_are_hit_by_the_next_turn_of_a_conversation():
    pipeline = pipeline_of(caches=True)
    pipeline.scheduler.add(request("a", [1, 2, 3], max_tokens=6))
    pipeline.drain()
    answer = pipeline.outputs_of("a")
    pipeline.scheduler.add(request("b", [1, 2, 3, *answer, 4]))
    assert spans_of(pipeline.step()) == [("b", 8, 2)]


def test_another_salt_shares_nothing():
    pipeline = pipeline_of(caches=True)
    for request_id, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        pipeline.scheduler.add(request(request_id, range(10), salt=salt))
        pipeline.drain()
    cached = [pipeline.updates[request_id][0].num_cached_tokens for request_id in "abc"]
    assert cached == [0, 0, 8]


def test_priority_order_is_smaller_first_then_arrival():
    scheduler = scheduler_of(num_slots=1, policy="priority")
    for request_id, priority in (("a", 2), ("b", 1), ("c", 1), ("d", -3)):
        scheduler.add(request(request_id, [1], priority=priority, max_tokens=1))
    order = []
    while scheduler.has_work:
        plan = scheduler.plan_step()
        order += ids_of(plan.admitted)
        scheduler.commit(plan, results_of(plan, 5))
    assert order == ["d", "b", "c", "a"]


def test_fcfs_ignores_priority():
    scheduler = scheduler_of()
    scheduler.add(request("a", [1], priority=5))
    scheduler.add(request("b", [1], priority=-5))
    assert ids_of(scheduler.plan_step().admitted) == ["a", "b"]


def test_a_full_queue_refuses_and_names_count_and_limit():
    scheduler = scheduler_of(max_waiting=2)
    scheduler.add(request("a", [1]))
    scheduler.add(request("b", [1]))
    with pytest.raises(QueueFull, match="2 requests wait already; the limit is 2"):
        scheduler.add(request("c", [1]))
    scheduler.plan_step()
    scheduler.add(request("c", [1]))


def test_prompts_that_cannot_be_served_are_refused():
    scheduler = scheduler_of(max_model_len=8)
    with pytest.raises(RequestError, match="0 tokens"):
        scheduler.add(request("a", []))
    with pytest.raises(PromptTooLong, match="8 tokens"):
        scheduler.add(request("a", range(8)))
    scheduler.add(request("a", range(7)))
    with pytest.raises(RequestError, match="'a' is in flight"):
        scheduler.add(request("a", [1]))


def test_a_context_that_does_not_fit_the_pool_is_an_error_at_start():
    with pytest.raises(AssertionError, match=r"pages_per_sequence=8 pool\.num_pages=7"):
        scheduler_of(num_pages=7, max_model_len=32)


def test_prompt_logprobs_take_a_row_for_each_prompt_position():
    scheduler = scheduler_of(num_slots=4, max_step_rows=4)
    scheduler.add(request("decode", [1]))
    scheduler.plan_step()
    scheduler.add(request("scored", range(6), prompt_logprobs=0))
    scheduler.add(request("next", [1, 2]))
    plans = [scheduler.plan_step() for _ in range(2)]
    assert spans_of(plans[0]) == [("decode", 1, 1), ("scored", 0, 3), ("next", 0, 1)]
    assert spans_of(plans[1]) == [("decode", 2, 1), ("next", 1, 1), ("scored", 3, 2)]
    assert [[span.num_rows for span in plan.spans] for plan in plans] == [[1, 3, 0], [1, 1, 2]]


@pytest.mark.parametrize("max_step_tokens", [2, 3, 16])
def test_prompt_logprobs_arrive_once_and_complete(max_step_tokens):
    pipeline = pipeline_of(caches=True, max_step_tokens=max_step_tokens)
    prompt = [3, 1, 4, 1, 5, 9, 2]
    pipeline.scheduler.add(request("first", prompt))
    pipeline.drain()
    pipeline.scheduler.add(request("scored", prompt, prompt_logprobs=0, logprobs=0))
    pipeline.drain()
    first, *others = pipeline.updates["scored"]
    expected = [logprobs_of(prompt[:end], prompt[end]) for end in range(1, 7)]
    assert first.prompt_logprobs == (None, *expected)
    assert first.num_cached_tokens == 0
    assert first.logprobs == (logprobs_of(prompt, next_token(prompt)),)
    assert [update.prompt_logprobs for update in others] == [None] * 3


def test_an_admission_beyond_an_upload_limit_waits_for_the_next_step():
    scheduler = scheduler_of(max_wide_admissions=1, max_history_tokens=32)
    scheduler.add(request("wide", [1], min_tokens=1))
    scheduler.add(request("wider", [1], logit_bias={3: 1.0}))
    scheduler.add(request("history", [1] * 3, presence_penalty=1.0))
    scheduler.add(request("longer", [1] * 30, repetition_penalty=1.5))
    admitted = [ids_of(scheduler.plan_step().admitted) for _ in range(3)]
    assert admitted == [["wide"], ["wider", "history"], ["longer"]]


def test_page_grants_limit_admissions():
    scheduler = scheduler_of(max_model_len=12, max_page_grants=3, max_step_tokens=32)
    scheduler.add(request("a", range(8)))
    scheduler.add(request("b", range(8)))
    assert spans_of(scheduler.plan_step()) == [("a", 0, 8), ("b", 0, 4)]
    assert spans_of(scheduler.plan_step()) == [("a", 8, 1), ("b", 4, 4)]


def test_page_grants_limit_prefills():
    limits = {"page_size": 2, "max_model_len": 12, "max_page_grants": 6, "max_step_tokens": 10}
    scheduler = scheduler_of(**limits)
    for name in "abc":
        scheduler.add(request(name, [1, 2]))
    scheduler.add(request("long", range(11)))
    assert spans_of(scheduler.plan_step())[-1] == ("long", 0, 4)
    # Three decodes enter a page each: three grants are left, of the four that 7 tokens need.
    assert spans_of(scheduler.plan_step())[-1] == ("long", 4, 6)


def test_page_grants_limit_decodes():
    limits = {"page_size": 2, "max_model_len": 6, "max_page_grants": 3}
    scheduler = scheduler_of(**limits)
    for name in "abcd":
        scheduler.add(request(name, [1, 2]))
    names = ["".join(name for name, *_ in spans_of(scheduler.plan_step())) for _ in range(5)]
    assert names == ["abc", "abc", "abcd", "abc", "d"]


def test_a_prefix_hit_that_exceeds_the_grants_is_shortened_when_the_step_is_otherwise_empty():
    pipeline = pipeline_of(caches=True, max_model_len=16, max_page_grants=4, page_size=4)
    pipeline.scheduler.add(request("a", range(15), max_tokens=None))
    pipeline.drain()
    pipeline.scheduler.add(request("decode", [7] * 4, max_tokens=9))
    pipeline.step()
    pipeline.scheduler.add(request("b", range(15), max_tokens=None))
    plan = pipeline.step()  # the decode enters its second page: 3 grants are left
    assert spans_of(plan) == [("decode", 4, 1), ("b", 8, 4)]


def test_admission_leaves_a_page_for_those_that_run():
    scheduler = scheduler_of(num_pages=8, page_size=4, max_step_tokens=32)
    scheduler.add(request("a", range(8)))
    scheduler.plan_step()
    scheduler.add(request("b", range(20)))
    assert spans_of(scheduler.plan_step()) == [("a", 8, 1)]
    scheduler.abort("b")
    scheduler.add(request("c", range(16)))
    assert spans_of(scheduler.plan_step()) == [("a", 9, 1), ("c", 0, 16)]


def test_all_pages_may_be_used_when_nothing_runs():
    scheduler = scheduler_of(num_pages=8, page_size=4, max_step_tokens=32)
    scheduler.add(request("a", range(31)))
    assert spans_of(scheduler.plan_step()) == [("a", 0, 31)]


def test_an_aborted_id_can_be_used_again_at_once():
    pipeline = pipeline_of()
    pipeline.scheduler.add(request("a", [1, 2]))
    pipeline.step()
    pipeline.scheduler.abort("a")
    pipeline.scheduler.add(request("a", [3, 4]))
    pipeline.drain()
    assert pipeline.outputs_of("a") == run_alone(request("a", [3, 4]), 32)[0]


def test_without_work_nothing_is_planned_and_nothing_is_held():
    scheduler = scheduler_of()
    assert scheduler.plan_step() is None
    assert not scheduler.has_work
    scheduler.check_idle()
    scheduler.add(request("a", [1]))
    with pytest.raises(AssertionError):
        scheduler.check_idle()
