"""What `transformers serve` 5.23 does to a model of one's own disk, mended: `mend_transformers_serve`.

| symptom                                                               | mended by                |
|-----------------------------------------------------------------------|--------------------------|
| 400 where a request names the model in other words than the server    | `_resolve_model`         |
| 500 for /v1/models without a hub's cache, else what that cache holds  | `get_gen_models`         |
| a message that spells `<|im_end|>` ends its turn (ground/chat.py)     | `_load_processor`        |
| an answer ends after 1,024 tokens, or runs on past the model's window | `generate_*`             |
| a refusal says why in a form that the openai package does not read    | `build_server`           |

Each has a test in tests/test_serve_compat.py that fails once upstream does it.
"""

from collections.abc import Callable
from typing import Any

from ground.chat import chat_tokenizer


def mend_transformers_serve() -> None:
    """Patch the classes behind `transformers serve`; a server has one model, its `force_model`."""
    from transformers.cli.serving import model_manager, server, utils

    manager = model_manager.ModelManager
    load_processor, resolve = manager._load_processor, utils.BaseHandler._resolve_model

    def any_name(self: Any, body: dict[str, Any]) -> Any:
        body["model"] = self.model_manager.force_model
        name, model, processor = resolve(self, body)
        if model.generation_config.max_new_tokens is None:
            model.generation_config.max_new_tokens = model.config.max_position_embeddings
        return name, model, processor

    def the_model(self: Any) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]

    def marked(self: Any, *arguments: Any, **options: Any) -> Any:
        return chat_tokenizer(load_processor(self, *arguments, **options))

    utils.BaseHandler._resolve_model = any_name
    manager.get_gen_models = the_model
    manager._load_processor = marked
    server.build_server = _with_messages(server.build_server)
    generate = utils.GenerateManager
    generate.generate_streaming = _in_window(generate.generate_streaming)
    generate.generate_non_streaming = _in_window(generate.generate_non_streaming)


def _in_window(generate: Callable[..., Any]) -> Callable[..., Any]:
    def generate_in_window(
        self: Any, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any
    ) -> Any:
        from fastapi import HTTPException

        prompt, window = inputs["input_ids"].shape[-1], model.config.max_position_embeddings
        if prompt >= window:
            detail = f"the conversation has {prompt} tokens, the model's window is {window}"
            raise HTTPException(status_code=400, detail=detail)
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, window - prompt)
        return generate(self, model, processor, inputs, gen_config, **more)

    return generate_in_window


def _with_messages(build: Callable[..., Any]) -> Callable[..., Any]:
    def build_with_messages(*arguments: Any, **options: Any) -> Any:
        from fastapi import HTTPException
        from fastapi.responses import JSONResponse

        async def as_openai(_: Any, error: HTTPException) -> JSONResponse:
            body = {"error": {"message": error.detail, "code": error.status_code}}
            return JSONResponse(body, status_code=error.status_code)

        app = build(*arguments, **options)
        app.add_exception_handler(HTTPException, as_openai)
        return app

    return build_with_messages
