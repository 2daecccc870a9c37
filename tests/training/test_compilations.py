"""What a run compiles: one program per shape and thing to do; where it has run before, nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from jax import monitoring

from configs import ar
from tests.support import runs
from tortoise_jax.checkpoints.parts import AR
from tortoise_jax.commands import KINDS
from tortoise_jax.training import loop, train
from tortoise_jax.training.train import Asked

REQUESTS, HITS = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"


@pytest.fixture
def events() -> Iterator[Counter[str]]:
    """How often JAX asked for a program, and found it compiled; however quickly it was compiled, it is kept."""
    counted: Counter[str] = Counter()
    count = lambda event, **_: counted.update([event])
    monitoring.register_event_listener(count)
    with runs.programs_kept(seconds=0.0):
        yield counted
    monitoring.unregister_event_listener(count)


@pytest.mark.slow
def test_a_run_that_starts_warm_compiles_nothing(
    tmp_path: Path, events: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the first one compiles its step and its evaluation once per length of rows, of which there are few."""
    traced: Counter[str] = Counter()
    for name in ("train_step", "eval_step"):
        function = getattr(loop, name)
        count = lambda *given, function=function, name=name: traced.update([name]) or function(*given)
        monkeypatch.setattr(loop, name, count)
    made: list[loop.Loop] = []
    monkeypatch.setattr(train, "Loop", lambda *given: made.append(loop.Loop(*given)) or made[-1])
    project = runs.write_project(tmp_path, runs.TWO_LENGTHS)
    settings = ar.get_config()
    settings.update(checkpoint=str(project / "checkpoint"), data=str(project / "data"))
    for name, value in runs.FIELDS.items():
        settings.update_from_flattened_dict({name: value})
    for name in ("cold", "warm"):
        events.clear()
        traced.clear()
        train.train(KINDS[AR], settings.copy_and_resolve_references(), Asked(str(tmp_path / name)))
        assert events[REQUESTS] > 0
        lengths = {made[-1].feed.training.batch(step)[0] for step in range(settings.steps)}
        assert len(lengths) == 2
        assert traced == {"train_step": len(lengths), "eval_step": 1}
    assert events[HITS] == events[REQUESTS]
