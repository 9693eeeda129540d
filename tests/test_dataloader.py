"""What the model sees: windows, positions, masks, and their independence of the layout."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EOS_ID, VOCAB_SIZE, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from ground import storage
from ground.errors import UserError
from nanotron_ext import dataloader
from nanotron_ext.dataloader import Loader, Windows, borders, positions, prefetch, window_indices
from nanotron_ext.job import Source
from nanotron_ext.micro_batch import MicroBatch
from nanotron_ext.mixture import build_mixture

S = 16


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    root = tmp_path_factory.mktemp("shards")
    return [
        Source(name, write_shard(root / name, tokens, seed=tokens, files=3), 2)
        for name, tokens in {"a": 3000, "b": 1000, "c": 400}.items()
    ]


def loader(
    sources: list[Source],
    weights: dict[str, float] | None = None,
    rank: int = 0,
    dp: int = 1,
    micro: int = 2,
    first: int = 0,
) -> Loader:
    mixture = build_mixture(weights or {"a": 0.6, "b": 0.3, "c": 0.1})
    return Loader(
        mixture,
        sources,
        sequence_length=S,
        micro_batch_size=micro,
        dp_rank=rank,
        dp_size=dp,
        first_sample=first,
        seed=6,
        eos_id=EOS_ID,
        vocab_size=VOCAB_SIZE,
    )


def one_by_one(stream: Loader, samples: int) -> list[list[int]]:
    """Tokens [samples, S+1] of the stage's first samples, a window and a token at a time."""
    tokens = [
        [token for shard in windows.shards for token in shard[:].tolist()]
        for windows in stream.windows
    ]
    found = []
    for sample in range(samples):
        (source,), (draw,) = stream.mixture.locate(np.array([sample]))
        window = window_at(stream, int(source), int(draw))
        found.append(tokens[source][window * (S + 1) : (window + 1) * (S + 1)])
    return found


def window_at(stream: Loader, source: int, draw: int) -> int:
    return int(window_indices(stream.windows[source], np.array([draw]), stream.seed)[0])


@pytest.mark.parametrize("looked_up", [1, 3, 1 << 13])
@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_are_those_of_a_plain_loop_over_tokens(
    sources: list[Source], micro: int, looked_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataloader, "LOOKED_UP_WINDOWS", looked_up)
    stream, batches = loader(sources, micro=micro), 60
    windows = iter(one_by_one(stream, batches * micro))
    for batch in islice(stream, batches):
        starts = []
        for row in range(micro):
            window, position = next(windows), 0
            assert batch.input_ids[row].tolist() == window[:-1]
            assert batch.label_ids[row].tolist() == window[1:]
            for index, token in enumerate(window[:-1]):
                position = 0 if index == 0 or window[index - 1] == EOS_ID else position + 1
                assert batch.position_ids[row, index] == position
                assert batch.label_mask[row, index] == (token != EOS_ID)
                starts += [row * S + index] if position == 0 else []
        assert batch.cu_seqlens.tolist() == [*starts, micro * S]
    dtypes = [x.dtype for x in vars(batch).values() if x is not None]
    assert dtypes == [torch.int64] * 2 + [torch.int32, torch.int64, torch.bool] + [torch.int64] * 2
    assert all(x.is_contiguous() for x in vars(batch).values() if x is not None)


@given(
    dp=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 4]),
    restart=st.integers(0, 12),
    looked_up=st.sampled_from([1, 5, 1 << 13]),
)
@settings(max_examples=30, deadline=None)
def test_any_data_parallel_size_and_any_restart_see_the_same_tokens(
    sources: list[Source], dp: int, micro: int, restart: int, looked_up: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataloader, "LOOKED_UP_WINDOWS", looked_up)
        same_tokens(sources, dp, micro, restart)


def same_tokens(sources: list[Source], dp: int, micro: int, restart: int) -> None:
    total = 96
    plain = one_by_one(loader(sources), total)
    step = dp * micro
    first = restart // step * step
    ranks = [iter(loader(sources, rank=r, dp=dp, micro=micro, first=first)) for r in range(dp)]
    seen = []
    for _ in range(first, total - step + 1, step):
        for rank in ranks:
            batch = next(rank)
            seen += np.concatenate([batch.input_ids, batch.label_ids[:, -1:]], axis=1).tolist()
    assert seen == plain[first : first + len(seen)]
    assert len(seen) > total - 2 * step - first


def test_a_stage_border_continues_each_source_where_it_stopped(sources: list[Source]) -> None:
    first, second = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 0.2, "b": 0.8}
    counts = build_mixture(first).counts(40)
    continued = [Source(s.name, s.folder, 2, counts.get(s.name, 0)) for s in sources[:2]]
    later = loader(continued, second)
    name_index = {name: i for i, name in enumerate(later.mixture.names)}
    index = name_index["b"]
    taken = [window_at(loader(sources), 1, draw) for draw in range(counts["b"])]
    following = [window_at(later, index, draw) for draw in range(10)]
    whole = [window_at(loader(sources), 1, draw) for draw in range(counts["b"] + 10)]
    assert taken + following == whole
    assert len(set(whole)) == len(whole)


def test_a_stream_counts_what_the_sampler_says(sources: list[Source]) -> None:
    stream = loader(sources)
    counts = np.zeros(3, np.int64)
    for batch in islice(stream, 50):
        counts += np.bincount(batch.sources, minlength=3)
    assert dict(zip(stream.mixture.names, counts.tolist(), strict=True)) == stream.mixture.counts(
        100
    )


def test_windows_span_shards_and_only_the_tail_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    tokens = np.arange(100, dtype=np.uint16)
    for number, part in enumerate(np.split(tokens, [13, 14, 60])):
        part.tofile(folder / f"{number}.ds")
    windows = Windows(Source("s", folder, 2), 17)
    assert windows.count == 5
    assert [windows.read(i).tolist() for i in range(5)] == tokens[:85].reshape(5, 17).tolist()


def test_a_shard_is_mapped_when_it_is_read_and_few_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux lets a process map 65,530 files, and a published mixture is many."""
    folder = tmp_path / "s"
    folder.mkdir()
    tokens = np.arange(900, dtype=np.uint16)
    for number, part in enumerate(np.split(tokens, 9)):
        part.tofile(folder / f"{number}.ds")

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(folder))

    monkeypatch.setattr(storage, "_mapped", lru_cache(2)(storage._mapped.__wrapped__))
    windows = Windows(Source("s", folder, 2), 50)
    assert mapped() == 0
    for index in (0, 17, 5, 8, 5, 0, 12):
        assert windows.read(index).tolist() == [*range(50 * index, 50 * index + 50)]
        assert 1 <= mapped() <= 2


def test_positions_restart_at_each_document_and_at_the_window() -> None:
    tokens = np.array([[5, 9, 3, 9, 9, 1], [9, 4, 4, 4, 4, 9]])
    assert positions(tokens, 9).tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3))
def test_borders_are_the_zeros_of_the_positions(windows: list[list[int]]) -> None:
    longest = max(map(sum, windows))
    windows = [[*row, longest - sum(row)] if sum(row) < longest else row for row in windows]
    position_ids = [np.concatenate([np.arange(n) for n in row]) for row in windows]
    found = borders(np.stack(position_ids))
    assert np.diff(found).tolist() == [length for row in windows for length in row]
    assert found.dtype == np.int32 and found[0] == 0


def test_borders_travel_with_each_micro_batch(sources: list[Source]) -> None:
    """They were read back from the device once: on a GPU the host then waits for every kernel."""
    found = set()
    for batch in islice(loader(sources), 20):
        assert batch.cu_seqlens.tolist() == borders(batch.position_ids.numpy()).tolist()
        assert set(range(0, 2 * S, S)) <= set(batch.cu_seqlens.tolist())
        found.add(len(batch.cu_seqlens))
    assert len(found) > 1, "the number of documents differs from batch to batch"


def test_without_document_masking_a_window_is_one_document_and_labels_stay(
    sources: list[Source],
) -> None:
    masked, whole = loader(sources), replace(loader(sources), masks_documents=False)
    for one, other in islice(zip(masked, whole, strict=True), 20):
        assert other.cu_seqlens.tolist() == [0, S, 2 * S]
        assert other.position_ids.tolist() == [list(range(S))] * 2
        for name in ("input_ids", "label_ids", "label_mask"):
            assert (getattr(one, name) == getattr(other, name)).all()


def test_a_label_that_opens_a_document_is_masked_and_no_other(sources: list[Source]) -> None:
    for batch in islice(loader(sources), 20):
        opens = batch.input_ids == EOS_ID  # the label is the token after the input
        assert (batch.label_mask == ~opens).all()
        assert (batch.input_ids[:, 1:] == batch.label_ids[:, :-1]).all()
        assert (batch.position_ids[:, 0] == 0).all()


def test_prefetch_hands_on_items_in_order_and_the_error_where_it_happened(
    sources: list[Source],
) -> None:
    batches = list(islice(loader(sources), 3))

    def items() -> Iterator[MicroBatch]:
        yield from batches
        raise UserError("source 'a': gone")

    stream = prefetch(items())
    for batch in batches:
        found = next(stream)
        assert found.input_ids.equal(batch.input_ids)
        assert found.input_ids.is_pinned() == torch.cuda.is_available()
    with pytest.raises(UserError, match="gone"):
        next(stream)


def test_bad_shards_are_named_with_their_source_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"source 'x': no token shard .*run the data stage again"):
        Windows(Source("x", tmp_path / "empty", 2), 17)
    short = write_shard(tmp_path / "short", 16)
    with pytest.raises(UserError, match=r"source 'x': 16 tokens .*fewer than one window of 17"):
        Windows(Source("x", short, 2), 17)
    corrupt = write_shard(tmp_path / "corrupt", 500)
    np.full(500, VOCAB_SIZE, np.uint16).tofile(corrupt / "00000.ds")
    with pytest.raises(UserError, match=r"source 'a': token 256 .*vocabulary 256.*corrupt"):
        next(iter(loader([Source("a", corrupt, 2)], {"a": 1.0})))
