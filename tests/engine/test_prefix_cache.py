import hashlib
import struct

from hypothesis import given, strategies as st

from jaxserve.engine.prefix_cache import PrefixCache, extend_digests


def cache_with(tokens, pages, *, salt="", page_size=2):
    cache = PrefixCache(page_size)
    cache.register([], tokens, salt, pages, 0)
    return cache


def test_a_digest_is_the_sha256_of_its_parent_and_int32_tokens():
    digests = []
    extend_digests(digests, [1, 2, 3, 4], 2, page_size=2, salt="s")
    first = hashlib.sha256(hashlib.sha256(b"s").digest() + struct.pack("=2i", 1, 2)).digest()
    second = hashlib.sha256(first + struct.pack("=2i", 3, 4)).digest()
    assert digests == [first, second]


def test_the_longest_known_prefix_of_full_pages_is_found():
    cache = cache_with([1, 2, 3, 4, 5, 6], [7, 8, 9])
    assert cache.lookup([], [1, 2, 3, 4, 9, 9, 9], "") == [7, 8]
    assert cache.lookup([], [9, 2, 3, 4, 5, 6, 7], "") == []


def test_one_token_is_always_left_to_compute():
    cache = cache_with([1, 2, 3, 4], [7, 8])
    assert cache.lookup([], [1, 2, 3, 4], "") == [7]
    assert cache.lookup([], [1, 2, 3, 4, 5], "") == [7, 8]


def test_another_salt_finds_nothing():
    cache = cache_with([1, 2], [7], salt="alice")
    assert cache.lookup([], [1, 2, 3], "alice") == [7]
    assert cache.lookup([], [1, 2, 3], "bob") == []


def test_a_salt_with_a_lone_surrogate_is_accepted():
    assert cache_with([1, 2], [7], salt="\ud800").lookup([], [1, 2, 3], "\ud800") == [7]


def test_equal_tokens_after_another_prefix_are_not_a_hit():
    cache = cache_with([1, 2, 3, 4], [7, 8])
    assert cache.lookup([], [3, 4, 3, 4, 5], "") == []


def test_an_evicted_page_is_not_hit_and_hides_what_follows_it():
    cache = cache_with([1, 2, 3, 4], [7, 8])
    cache.evict([7, 0])
    assert cache.lookup([], [1, 2, 3, 4, 5], "") == []
    assert len(cache) == 1


def test_the_first_page_with_some_content_stays_the_known_one():
    cache = cache_with([1, 2], [7])
    cache.register([], [1, 2], "", [8], 0)
    assert cache.lookup([], [1, 2, 3], "") == [7]
    cache.evict([8])
    assert cache.lookup([], [1, 2, 3], "") == [7]


def test_a_cache_turned_off_hits_nothing():
    cache = PrefixCache(2, enabled=False)
    cache.register([], [1, 2], "", [7], 0)
    assert cache.lookup([], [1, 2, 3], "") == []
    assert len(cache) == 0


tokens = st.lists(st.integers(0, 1), max_size=9)


@given(st.lists(st.tuples(tokens, st.booleans()), max_size=12), st.integers(1, 3))
def test_any_history_agrees_with_a_search_over_all_pages(history, page_size):
    cache, contents, next_page = PrefixCache(page_size), {}, 0
    for sequence, evicts in history:
        ends = range(page_size, len(sequence) + 1, page_size)
        prefixes = [tuple(sequence[:end]) for end in ends]
        hits = []
        for prefix in prefixes[: (len(sequence) - 1) // page_size] if sequence else ():
            if prefix not in contents.values():
                break
            hits.append(prefix)
        found = cache.lookup([], sequence, "") if sequence else []
        assert [contents[page] for page in found] == hits
        pages = list(range(next_page, next_page + len(prefixes)))
        next_page += len(pages)
        cache.register([], sequence, "", pages, 0)
        for page, prefix in zip(pages, prefixes, strict=True):
            if prefix not in contents.values():
                contents[page] = prefix
        if evicts and contents:
            evicted = min(contents)
            cache.evict([evicted])
            del contents[evicted]
        cache.check()
