import pytest
from hypothesis import given, strategies as st

from jaxserve.engine.pages import PagePool


def test_pages_are_taken_in_order_and_counted():
    pool = PagePool(4)
    assert pool.take(3) == [0, 1, 2]
    assert pool.num_free == 1
    pool.check()


def test_taking_too_many_pages_takes_none():
    pool = PagePool(3)
    assert pool.take(4) is None
    assert pool.num_free == 3
    assert pool.take(3) == [0, 1, 2]


def test_the_tail_of_a_sequence_is_reused_before_its_head():
    pool = PagePool(3)
    pool.free(pool.take(3))
    assert pool.take(3) == [2, 1, 0]


def test_the_page_freed_longest_ago_is_taken_first():
    pool = PagePool(4)
    first, second = pool.take(1), pool.take(2)
    pool.free(second)
    pool.free(first)
    assert pool.take(4) == [3, 2, 1, 0]


def test_a_shared_page_is_free_only_after_its_last_holder_left():
    pool = PagePool(2)
    pages = pool.take(1)
    pool.share(pages)
    pool.free(pages)
    assert (pool.num_free, pool.num_holders_of(0)) == (1, 1)
    pool.free(pages)
    assert pool.num_free == 2


def test_a_free_page_can_be_shared_out_of_the_middle_of_the_list():
    pool = PagePool(4)
    pool.share([2])
    assert pool.count_free([0, 1, 2, 3]) == 3
    assert pool.take(3) == [0, 1, 3]
    pool.check()


def test_freeing_a_free_page_is_an_error():
    with pytest.raises(AssertionError, match="free already"):
        PagePool(1).free([0])


operations = st.lists(
    st.tuples(st.sampled_from(["take", "share", "free"]), st.integers(0, 6), st.integers(0, 6))
)


@given(operations)
def test_any_history_agrees_with_a_list_of_free_pages(history):
    pool, free, holders = PagePool(7), list(range(7)), [0] * 7
    for name, page, count in history:
        if name == "take":
            expected = free[:count] if count <= len(free) else None
            assert pool.take(count) == expected
            for taken in expected or ():
                free.remove(taken)
                holders[taken] = 1
        elif name == "share":
            pool.share([page])
            holders[page] += 1
            free = [other for other in free if other != page]
        elif holders[page]:
            pool.free([page])
            holders[page] -= 1
            free += [page] * (holders[page] == 0)
        pool.check()
        assert pool.num_free == len(free)
        assert [pool.num_holders_of(page) for page in range(7)] == holders
