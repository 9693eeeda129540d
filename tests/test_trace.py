"""What a run says that it saw, and what the order says, whatever the layout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EOS_ID, VOCAB_SIZE, job_maker, metrics, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import DP2, PP2, TP2, run

from ground.batch_hash import row_hash, shown, token_hash, total
from ground.errors import UserError
from nanotron_ext.job import Job, Source
from nanotron_ext.trace import Trace

S, WINDOWS = 32, 4


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A stage that goes on after others, through several epochs of its smaller sources."""
    root = tmp_path_factory.mktemp("trace")
    sources = [
        Source(name, write_shard(root / name, tokens, seed=tokens, files=2), 2, drawn)
        for name, (tokens, drawn) in {"a": (3000, 0), "b": (700, 50), "c": (90, 7)}.items()
    ]
    return Job(
        stage="stage", weights={"a": 0.6, "b": 0.3, "c": 0.1}, sources=sources, decay_exclude=[],
        data_seed=6, eos_id=EOS_ID, first_step=20, tokens_before=0, cache=root / "cache",
    )  # fmt: skip


def trace_of(job: Job, last_step: int) -> Trace:
    return Trace(job, S, WINDOWS, last_step, VOCAB_SIZE)


@given(st.integers(21, 140))
@settings(max_examples=20, deadline=None)
def test_every_window_names_all_the_steps_that_show_it_and_no_other(job: Job, last: int) -> None:
    trace = trace_of(job, last)
    seen: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for step in range(21, last + 1):
        for window in trace.windows(step):
            seen.setdefault((window.source, window.index), []).append(
                (step, window.place, window.epoch)
            )
    for source in ("a", "b", "c"):
        every = np.arange(trace.count(source))
        found: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
        for one in trace.shown(source, every):
            found.setdefault((source, one.window), []).append((one.step, one.place, one.epoch))
        assert found == {key: value for key, value in seen.items() if key[0] == source}


def test_steps_of_another_stage_are_refused(job: Job) -> None:
    for step in (20, 141):
        with pytest.raises(UserError, match=rf"STEP={step}: stage takes the steps 21 to 140"):
            list(trace_of(job, 140).windows(step))


def test_a_hash_is_of_ids_whatever_the_width_and_of_each_of_them() -> None:
    ids = np.array([1, 2, 300])
    assert token_hash(ids.astype(np.uint16)) == token_hash(ids.astype(np.uint32)) == token_hash(ids)
    assert len({token_hash(ids), token_hash(ids[::-1]), token_hash(ids[:2]), token_hash([1, 2, 301])}) == 4  # fmt: skip
    assert row_hash([1, 2], [3]) != row_hash([1], [2, 3])
    assert row_hash([1], [-100]) == row_hash([1], np.array([-100])) != row_hash([-100], [1])
    assert 0 <= total([(1 << 63) - 1, 2]) == 1
    assert len(shown(1)) == 16


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one, micro-batches of 2": (1, {"tokens.micro_batch_size": 2, "tokens.batch_accumulation_per_replica": 2}),
    "dp 2": (2, DP2),
    "tp 2": (2, TP2),
    "pp 2": (2, PP2),
    "dp 2, tp 2": (4, {**DP2, **TP2}),
}  # fmt: skip


@pytest.mark.slow
def test_a_run_logs_what_the_order_says_in_every_layout_and_after_a_resume(
    tmp_path: Path,
) -> None:
    make: Callable[..., Path] = job_maker(tmp_path)
    folders = {name: make(name, overlay) for name, (_, overlay) in LAYOUTS.items()}
    for processes in (1, 2, 4):
        run([folders[name] for name, (size, _) in LAYOUTS.items() if size == processes], processes)
    resume = folders["dp 2"] / "checkpoints" / "3"
    folders["one, resumed from dp 2"] = make("resumed", resume=resume)
    run([folders["one, resumed from dp 2"]], 1)
    trace = trace_of(Job.read(folders["one"]), last_step=6)
    planned = {step: trace.batch_hash(step) for step in range(1, 7)}
    assert len(set(planned.values())) == 6
    for name, folder in folders.items():
        logged = {line["step"]: line["batch_hash"] for line in metrics(folder)}
        assert list(logged) == ([4, 5, 6] if "resumed" in name else [1, 2, 3, 4, 5, 6])
        assert all(planned[step] == value for step, value in logged.items()), name
    other = trace_of(replace(trace.job, data_seed=7), last_step=6)
    assert all(other.batch_hash(step) != planned[step] for step in planned)
