"""Cores by NUMA node, from trees as Linux has them; this machine has one node or doesn't matter."""

import pytest

from minilm.orchestrator.system import numa


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function of each node's list of cores and the cores that this process may use."""

    def make(lists: dict[int, str], allowed: set[int]) -> None:
        for number, text in lists.items():
            folder = tmp_path / f"node{number}"
            folder.mkdir()
            (folder / "cpulist").write_text(f"{text}\n")
        (tmp_path / "online").write_text("0-1\n")
        monkeypatch.setattr(numa, "NODES", tmp_path)
        monkeypatch.setattr(numa.os, "sched_getaffinity", lambda _: frozenset(allowed))

    return make


TWO = {0: "0-3,8-11", 1: "4-7,12-15"}
FIRST, SECOND = {0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}


@pytest.mark.parametrize(
    ("lists", "allowed", "nodes"),
    [
        (TWO, set(range(16)), [FIRST, SECOND]),
        (TWO, {2, 3, 4}, [{2, 3}, {4}]),
        (TWO, {1, 8}, [{1, 8}]),
        ({0: "0-1", 1: "", 2: "2", 10: "3"}, {0, 1, 2, 3}, [{0, 1}, {2}, {3}]),  # 1: memory without cores
        ({0: "0-1"}, {0, 1, 2}, [{0, 1, 2}]),  # a core of which no node tells
        ({0: "0-1", 1: "all"}, {0, 1}, [{0, 1}]),
        ({}, {0, 5}, [{0, 5}]),
    ],
)
def test_nodes_are_those_with_cores_that_the_process_may_use(machine, lists, allowed, nodes):
    machine(lists, allowed)
    assert numa.numa_nodes() == nodes


def test_a_system_without_affinities_is_one_node(machine, monkeypatch):
    machine({}, {0})
    monkeypatch.delattr(numa.os, "sched_getaffinity")
    monkeypatch.setattr(numa.os, "cpu_count", lambda: 3)
    assert numa.numa_nodes() == [{0, 1, 2}]


FOUR = {0: "0-1", 1: "2-3", 2: "4-5", 3: "6-7"}


@pytest.mark.parametrize(
    ("lists", "size", "threads", "shares"),
    [
        (TWO, 2, 8, [FIRST, SECOND]),
        (TWO, 4, 4, [FIRST, FIRST, SECOND, SECOND]),
        (FOUR, 2, 4, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (TWO, 1, 16, [None]),
        (TWO, 3, 5, [None, None, None]),  # nodes and workers do not go into each other
        (FOUR, 3, 2, [None, None, None]),
        (TWO, 2, 9, [None, None]),  # no core for each thread
        (TWO, 4, 5, [None] * 4),
        ({0: "0-15"}, 2, 8, [None, None]),
    ],
)
def test_each_worker_of_a_machine_has_its_nodes(machine, lists, size, threads, shares):
    machine(lists, set().union(*map(numa.cores_of, lists.values())))
    assert [numa.own_cores(rank, size, threads) for rank in range(size)] == shares


def test_a_worker_keeps_to_its_node(machine, monkeypatch):
    machine(TWO, set(range(16)))
    bound = []
    monkeypatch.setattr(numa.os, "sched_setaffinity", lambda *given: bound.append(given))
    numa.keep_to_own_cores(16)
    assert bound == [], "one worker alone has them all"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    numa.keep_to_own_cores(8)
    assert bound == [(0, SECOND)]
