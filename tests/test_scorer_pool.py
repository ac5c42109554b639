"""Scorers in actors that die: their rows go to new ones, and only deaths without an answer end a run."""

import os

import pytest

from rayrm.errors import RayRMError
from rayrm.scoring.grammar import GrammarScoring
from rayrm.training.ppo import scorers
from rayrm.training.ppo.scorers import ScorerPool


class Frail:
    """A scorer that dies of the text poison, and the first time of the text in `once`, a file that it removes."""

    def __init__(self, config, revision):
        pass

    def call(self, method, rows):
        for row in rows:
            if "once" in row:
                try:
                    os.remove(row["once"])
                except FileNotFoundError:
                    continue
                os._exit(1)
            if row["candidates"] == ["poison"]:
                os._exit(1)
        return [[len(text) for text in row["candidates"]] for row in rows], 3.0


@pytest.mark.ray
def test_deaths_are_forgiven_with_every_answer(tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setattr(scorers, "ScorerActor", Frail)
    config = GrammarScoring.model_validate({"workers": {"num_workers": 2, "num_cpus": 0.5}})
    pool = ScorerPool([config], max_failures=1)
    rows = [{"candidates": ["a" * length]} for length in range(5)]
    try:
        for number in range(3):
            once = tmp_path / str(number)
            once.touch()
            tickets = [pool.submit(config.name, "text", [*rows, {"candidates": ["bb", ""], "once": str(once)}])]
            # Rows behind those that the actor died of.
            tickets.append(pool.submit(config.name, "text", rows))
            assert pool.result(tickets[0]) == [[0], [1], [2], [3], [4], [2, 0]]
            assert pool.result(tickets[1]) == [[0], [1], [2], [3], [4]]
            assert not once.exists()
            # Two pieces of work of 3 s for each of two actors, whatever was begun by those that died.
            assert pool.take_busy() == 6.0 and pool.take_busy() == 0
        with pytest.raises(RayRMError, match=f"Actors of the scorer '{config.name}' keep dying"):
            pool.result(pool.submit(config.name, "text", [*rows, {"candidates": ["poison"]}]))
    finally:
        pool.close()
