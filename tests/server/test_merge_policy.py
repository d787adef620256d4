"""When the policy merges and unmerges, by a clock that the tests turn."""

import itertools
from concurrent.futures import Future

import pytest
from hotswap_server.adapters.auto_merge import AutoMerge
from hotswap_server.core import AdapterRef
from hotswap_server.engine.merge_policy import MergePolicy
from hotswap_server.engine.observer import StepRecord
from hotswap_server.errors import CapacityError, MergeRefusedError

WINDOW = 20.0
HOT = AdapterRef("acme/hot", 1, "1", "lora")
OTHER = AdapterRef("acme/other", 1, "2", "lora")
PREFIX = AdapterRef("acme/prefix", 1, "3", "prefix")


class FakeMerges:
    """Does at once what it is told, unless it has an error."""

    def __init__(self):
        self.merged = None
        self.error = None
        self.calls = []

    def merge(self, ref):
        return self._do("merge", ref, ref)

    def unmerge(self, name, version):
        return self._do("unmerge", self.merged, None)

    def _do(self, what, ref, merged):
        self.calls.append((what, ref))
        future = Future()
        if self.error is None:
            self.merged = merged
            future.set_result(None)
        else:
            future.set_exception(self.error)
        return future


class Traffic:
    """A step a second, 100 tokens each."""

    def __init__(self, share=0.9):
        self.now = 0.0
        self.merges = FakeMerges()
        policy = MergePolicy(share=share, window_s=WINDOW, clock=lambda: self.now)
        self.auto = AutoMerge(policy, self.merges)

    def run(self, seconds, tokens):
        """For `seconds`; gives what was called, and when, counted from the start of this run."""
        started, found = self.now, []
        for _ in range(seconds):
            self.now += 1.0
            before = len(self.merges.calls)
            self.auto.step(StepRecord(0.1, 0, 100, 4, 1, 4, 0, 1, 10, tokens))
            found += [(self.now - started, *call) for call in self.merges.calls[before:]]
        return found

    def idle(self, seconds):
        self.now += seconds


def hot(share):
    return {HOT: share, None: 100 - share}


def test_an_adapter_alone_is_merged_after_the_window():
    traffic = Traffic()
    assert traffic.run(19, hot(100)) == []
    [(seconds, *call)] = traffic.run(20, hot(100))
    assert call == ["merge", HOT]
    assert seconds <= 3  # a slice, and the step that ends it
    assert traffic.run(100, hot(100)) == []


@pytest.mark.parametrize(("share", "calls"), [(89, 0), (91, 1)])
def test_the_share_decides(share, calls):
    assert len(Traffic().run(200, hot(share))) == calls


def test_the_base_and_what_cannot_be_merged_are_never_merged():
    assert Traffic().run(100, {None: 100}) == []
    assert Traffic().run(100, {PREFIX: 95, HOT: 5}) == []


def test_a_dip_leaves_it_merged_and_its_end_unmerges():
    traffic = Traffic()
    traffic.run(40, hot(100))
    assert traffic.merges.merged == HOT
    assert traffic.run(200, hot(65)) == []  # over two thirds of 0.9
    [(seconds, *call)] = traffic.run(40, hot(10))
    assert call == ["unmerge", HOT]
    assert 1 < seconds < 10
    assert traffic.run(100, hot(10)) == []
    assert traffic.run(100, hot(80)) == []


def test_alternating_traffic_changes_nothing_more_often_than_a_window():
    traffic = Traffic()
    calls = []
    for _ in range(30):
        at = traffic.now
        calls += [at + seconds for seconds, *_ in traffic.run(5, hot(100)) + traffic.run(5, hot(0))]
    assert calls == []
    for _ in range(10):
        at = traffic.now
        calls += [at + seconds for seconds, *_ in traffic.run(30, hot(100))]
        at = traffic.now
        calls += [at + seconds for seconds, *_ in traffic.run(30, hot(0))]
    assert 2 <= len(calls) <= 20
    assert min(b - a for a, b in itertools.pairwise(calls)) >= WINDOW


def test_a_pause_changes_nothing_and_a_burst_of_another_must_last():
    traffic = Traffic()
    traffic.run(40, hot(100))
    traffic.idle(500)
    assert traffic.run(1, hot(100)) == []
    traffic.idle(500)
    calls = traffic.run(60, {OTHER: 100})
    assert calls[-1][1:] == ("merge", OTHER)
    assert calls[-1][0] >= WINDOW
    assert traffic.merges.merged == OTHER


def test_another_takes_its_place():
    traffic = Traffic()
    traffic.run(60, {HOT: 100})
    calls = traffic.run(100, {OTHER: 100})
    assert [call[1:] for call in calls] in (
        [("unmerge", HOT), ("merge", OTHER)],
        [("merge", OTHER)],
    )


def test_what_an_operator_merged_stays_and_what_one_unmerged_is_let_be():
    traffic = Traffic()
    traffic.merges.merged = OTHER
    assert traffic.run(100, hot(100)) == []
    traffic.merges.merged = None
    assert traffic.run(100, hot(100)) != []
    traffic.merges.merged = None
    assert traffic.run(200, hot(100)) == []
    traffic.run(100, {OTHER: 60, HOT: 40})
    assert [call[1:] for call in traffic.run(100, hot(100))] == [("merge", HOT)]


def test_a_refused_adapter_is_not_asked_for_again_and_others_are():
    traffic = Traffic()
    traffic.merges.error = MergeRefusedError("it changes the embedding")
    assert len(traffic.run(300, hot(100))) == 1
    traffic.merges.error = None
    assert traffic.run(300, hot(100)) == []
    assert [call[1:] for call in traffic.run(100, {OTHER: 100})] == [("merge", OTHER)]


def test_another_failure_is_tried_again_after_a_window():
    traffic = Traffic()
    traffic.merges.error = CapacityError("all slots are pinned")
    calls = traffic.run(100, hot(100))
    assert 3 <= len(calls) <= 5
    assert {call[1:] for call in calls} == {("merge", HOT)}
