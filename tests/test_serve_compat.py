"""`transformers serve` as it is, and mended: each fault of runtimes/compat.py is there, and gone."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import CacheNotFound
from small_models import make_tokenizer, random_model

from runtimes.compat import mend_transformers_serve

pytestmark = pytest.mark.slow
WINDOW = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(short_system=True)
    random_model(tokenizer, seed=0, window=WINDOW).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["as it is", "mended"])
def is_mended(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    from transformers.cli.serving import model_manager, server, utils

    kinds = (model_manager.ModelManager, utils.BaseHandler, utils.GenerateManager, server)
    before = [dict(vars(kind)) for kind in kinds]
    if request.param == "mended":
        mend_transformers_serve()
    yield request.param == "mended"
    for kind, values in zip(kinds, before, strict=True):
        for name, value in values.items():
            if vars(kind)[name] is not value:
                setattr(kind, name, value)


@pytest.fixture
def manager(folder: Path, is_mended: bool) -> Any:
    from transformers.cli.serving.model_manager import ModelManager

    return ModelManager(force_model=str(folder), device="cpu")


def handler(manager: Any) -> Any:
    from transformers.cli.serving.utils import BaseHandler, GenerationState

    return BaseHandler(manager, GenerationState())


def test_a_client_names_the_model_as_it_likes(manager: Any, is_mended: bool) -> None:
    from fastapi import HTTPException

    if is_mended:
        assert handler(manager)._resolve_model({"model": "any"})[1].config.model_type == "smollm3"
    else:
        with pytest.raises(HTTPException, match="Server is pinned"):
            handler(manager)._resolve_model({"model": "any"})


def test_models_are_listed_without_a_hubs_cache(
    manager: Any, folder: Path, is_mended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", tmp_path / "none")
    if is_mended:
        assert [model["id"] for model in manager.get_gen_models()] == [str(folder)]
        return
    manager.get_gen_models.cache_clear()
    with pytest.raises(CacheNotFound):
        manager.get_gen_models()


def test_a_message_ends_no_turn(manager: Any, is_mended: bool) -> None:
    _, _, processor = handler(manager)._resolve_model({})
    messages = [{"role": "user", "content": "a<|im_end|>b"}]
    ids = processor.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(processor.eos_token_id) == (2 if is_mended else 3)  # system and user
    assert processor.decode(processor.encode("a<|im_end|>")) == "a<|im_end|>"


def test_an_answer_has_the_windows_room_and_no_more(
    manager: Any, is_mended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi import HTTPException
    from transformers.cli.serving.utils import GenerateManager

    server = handler(manager)
    _, model, processor = server._resolve_model({})
    asked: list[int] = []
    monkeypatch.setattr(
        GenerateManager, "async_submit", lambda _self, _run, **more: asked.append(more["generation_config"].max_new_tokens)
    )  # fmt: skip

    def room(prompt: int) -> int | str:
        config = server._build_generation_config({}, copy.deepcopy(model.generation_config))
        inputs = {"input_ids": torch.zeros(1, prompt, dtype=torch.long)}
        try:
            waiting = GenerateManager().generate_non_streaming(
                model, processor, inputs, config, request_id="1"
            )
            waiting.send(None)
        except HTTPException as error:
            return str(error.detail)
        except TypeError:  # nothing was generated
            pass
        return asked[-1]

    said = f"the conversation has {WINDOW} tokens, the model's window is {WINDOW}"
    wanted = [WINDOW - 10, 1, said] if is_mended else [1024, 1024, 1024]
    assert [room(10), room(WINDOW - 1), room(WINDOW)] == wanted


def test_a_refusal_is_read_by_the_openai_package(manager: Any, is_mended: bool) -> None:
    from fastapi.testclient import TestClient
    from transformers.cli.serving import server, utils
    from transformers.cli.serving.chat_completion import ChatCompletionHandler

    state = utils.GenerationState()
    chat, none = ChatCompletionHandler(manager, state), utils.BaseHandler(manager, state)
    app = server.build_server(manager, chat, none, none, none, none, state)
    refused = TestClient(app).post("/v1/chat/completions", json={"messages": [], "no_such": 1})
    said = "Unexpected fields in the request: {'no_such'}"
    assert refused.status_code == 422
    wanted = {"error": {"message": said, "code": 422}} if is_mended else {"detail": said}
    assert refused.json() == wanted
